"""The scores of the imitations' answers, worked out by hand: of all right ones, and of those with planned mistakes."""

from __future__ import annotations

FULL_MARKS: dict[str, dict[str, float]] = {
    "gqa": {"exact_match": 1},
    "mmbench_en_dev_static": {"gpt_eval_score": 100},
    "pope": {"pope_accuracy": 1, "pope_precision": 1, "pope_recall": 1, "pope_f1_score": 1, "pope_yes_ratio": 0.5},
    "pope_first_sentence": {"pope_accuracy": 1, "pope_f1_score": 1, "pope_answer_yes_ratio": 0.5},
    "textvqa_val": {"exact_match": 1},
    "textvqa_val_ocr": {"exact_match": 1},
    "scienceqa_img": {"exact_match": 1},
    "mme": {"mme_perception_score": 400, "mme_cognition_score": 200},  # two categories, and one
    "ai2d": {"exact_match": 1},
    "mmstar": {"average": 1, "coarse perception": 1, "math": 1},
    "mmmu_val": {"mmmu_acc": 1},
}

WITH_MISTAKES: dict[str, dict[str, float]] = {
    "gqa": {"exact_match": 4 / 6},
    # of four questions one falls by its rotation and one by itself
    "mmbench_en_dev_static": {"gpt_eval_score": 50},
    # strict: 2 of 4 yes found, one no, one sentence that is neither; 2 of 4 no taken for yes
    "pope": {
        "pope_accuracy": 4 / 8,
        "pope_precision": 2 / 4,
        "pope_recall": 2 / 3,
        "pope_f1_score": 4 / 7,
        "pope_yes_ratio": 0.5,
    },
    # the sentence is a yes: 3 of 4 found
    "pope_first_sentence": {
        "pope_accuracy": 5 / 8,
        "pope_precision": 3 / 5,
        "pope_recall": 3 / 4,
        "pope_f1_score": 2 / 3,
        "pope_answer_yes_ratio": 5 / 8,
    },
    "textvqa_val": {"exact_match": (1 + 0.6 + 0) / 3},
    "textvqa_val_ocr": {"exact_match": (1 + 0.6 + 0) / 3},
    "scienceqa_img": {"exact_match": 3 / 5},
    # existence: (50 + 200) / 2, color: 0; code_reasoning: 200
    "mme": {"mme_perception_score": 125, "mme_cognition_score": 200},
    "ai2d": {"exact_match": 3 / 4},
    "mmstar": {"average": 4.5 / 6, "coarse perception": 0.5, "science & technology": 0, "math": 1},
    "mmmu_val": {"mmmu_acc": 3 / 4},
}

# the sum of the credits of a task's questions, for all right and with mistakes
CREDITS = {
    "gqa": (6, 4),
    "mmbench_en_dev_static": (4, 3),  # a question that falls by its rotation is right by itself
    "pope": (8, 4),
    "pope_first_sentence": (8, 5),
    "textvqa_val": (3, 1.6),
    "textvqa_val_ocr": (3, 1.6),
    "scienceqa_img": (5, 3),
    "mme": (8, 5),
    "ai2d": (4, 3),
    "mmstar": (7, 5),
    "mmmu_val": (4, 3),
}
