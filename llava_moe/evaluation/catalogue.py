"""The benchmarks and suites by name: facts read from the task files of lmms-eval 0.7.3, which a test compares again.

Which tasks a suite has comes from the papers: LLaVA-1.5 (arXiv 2310.03744, tables 3 and 4), LibMoE (arXiv 2411.00918
v4, table 1, for its twelve; its published result file for the sixteen). Where a paper's number came from a test server,
the public validation split stands in its place and the note says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llava_moe.evaluation import intervals
from llava_moe.evaluation.stats import Interval, wilson_interval
from llava_moe.evaluation.suites import Benchmark, Credit, Source, Suite
from llava_moe.evaluation.tasks import LOCAL_TASKS

ROTATION = 10**6  # index of a rotated question: that of the question and multiples of this


def _number(key: str) -> Credit:
    return lambda sample: float(sample[key])


def _score_in(*keys: str) -> Credit:
    """The `score` of the first of the metrics that the question counts in."""

    def credit(sample: dict[str, Any]) -> float | None:
        return next((float(sample[key]["score"]) for key in keys if isinstance(sample.get(key), dict)), None)

    return credit


def _same_letter(key: str) -> Credit:
    def credit(sample: dict[str, Any]) -> float:
        row = sample[key]
        return float(row["pred"].lower().strip() == row["answer"].lower().strip())

    return credit


def _mmbench_right(sample: dict[str, Any]) -> float:
    import pandas
    from lmms_eval.tasks.mmbench.en_utils import mmbench_evaluator

    row = sample["gpt_eval_score"]
    frame = pandas.DataFrame([{**row, "prediction": str(row["prediction"])}])
    return float(mmbench_evaluator.eval_sub_data(frame, {row["index"]: row["answer"]}, static_only=True))


def _mmbench(sample: dict[str, Any]) -> float | None:
    """None for a rotation of another question (index from 10**6 on), which counts there."""
    return None if int(sample["gpt_eval_score"]["index"]) >= ROTATION else _mmbench_right(sample)


def _mmbench_estimate(samples: Sequence[Mapping[str, Any]]) -> tuple[float, Interval]:
    """Percent of the questions whose rotations are all answered right."""
    found: dict[int, float] = {}
    for sample in samples:
        question = int(sample["gpt_eval_score"]["index"]) % ROTATION
        found[question] = min(found.get(question, 1.0), _mmbench_right(dict(sample)))
    low, high = wilson_interval(sum(found.values()), len(found))
    return 100 * sum(found.values()) / len(found), (100 * low, 100 * high)


def _mmmu(sample: dict[str, Any]) -> float:
    from lmms_eval.tasks.mmmu.utils import evaluate_mmmu

    return float(evaluate_mmmu([sample["mmmu_acc"]])[1]["acc"])


def _not_extracted(sample: dict[str, Any]) -> bool:
    """An answer from which neither a rule nor the judge made something: MathVista would compare nothing."""
    said = "".join(map(str, sample["filtered_resps"])).strip()
    return bool(said) and sample["llm_as_judge_eval"]["extraction"] == ""


def _local(name: str) -> Credit:
    return lambda sample: float(LOCAL_TASKS.get(name).is_correct(sample))


def _hub(name: str, split: str, config: str | None = None) -> Source:
    return Source(f"lmms-lab-encoder/{name}", config, split)


TEXTVQA = (_hub("textvqa", "validation"),)
POPE = (_hub("POPE", "test"),)
HALLUSION = (_hub("HallusionBench", "image"),)
MATHVISTA = (Source("AI4Math/MathVista", None, "testmini"),)
OWN = "task of ours, in llava_moe/evaluation/tasks/benchmarks"
# MMMU has one configuration for each subject in its authors' repository, and one in lmms-lab's copy.
MMMU = (_hub("MMMU", "validation"),)
GQA = (
    _hub("GQA", "testdev", "testdev_balanced_instructions"),
    _hub("GQA", "testdev", "testdev_balanced_images"),
)

_CORE = (
    Benchmark("gqa", ("exact_match",), 1.0, GQA, credit=_number("exact_match"), is_mean=True),
    Benchmark(
        "mmbench_en_dev_static",
        ("gpt_eval_score",),
        100.0,
        (_hub("MMBench", "dev", "en"),),
        credit=_mmbench,
        estimate=_mmbench_estimate,
        note="letters by rules, no judge; the leaderboard's numbers use one for answers that no rule reads",
    ),
    Benchmark(
        "pope",
        ("pope_f1_score",),
        1.0,
        POPE,
        credit=_score_in("pope_accuracy"),
        estimate=intervals.f1("pope_f1_score"),
        note="an answer other than a bare yes or no is wrong; pope_yes_ratio counts the references (lmms-eval), "
        "use pope_first_sentence for the real one",
    ),
    Benchmark(
        "pope_first_sentence",
        ("pope_f1_score",),
        1.0,
        POPE,
        credit=_score_in("pope_accuracy"),
        estimate=intervals.f1("pope_f1_score"),
        prompt="as pope",
        note=f"LLaVA's reading of the answer's first sentence, real yes ratio; {OWN}",
    ),
    Benchmark(
        "textvqa_val",
        ("exact_match",),
        1.0,
        TEXTVQA,
        credit=_number("exact_match"),
        is_mean=True,
        ocr=False,
        note="LLaVA-1.5's published score has OCR tokens: textvqa_val_ocr",
    ),
    Benchmark(
        "textvqa_val_ocr",
        ("exact_match",),
        1.0,
        TEXTVQA,
        credit=_number("exact_match"),
        is_mean=True,
        ocr=True,
        prompt="Reference OCR token",
        note=f"LLaVA's prompt with the data set's OCR tokens; {OWN}",
    ),
    Benchmark(
        "scienceqa_img",
        ("exact_match",),
        1.0,
        (_hub("ScienceQA", "test", "ScienceQA-IMG"),),
        credit=_number("exact_match"),
        is_mean=True,
    ),
    Benchmark(
        "mme",
        ("mme_perception_score", "mme_cognition_score"),
        2800.0,
        (_hub("MME", "test"),),
        credit=_score_in("mme_perception_score", "mme_cognition_score"),
        estimate=intervals.pairs("mme_perception_score", "mme_cognition_score"),
        group=2,
        note="perception (of 2000) and cognition (of 800) together; LLaVA publishes perception alone",
    ),
    Benchmark(
        "ai2d",
        ("exact_match",),
        1.0,
        (_hub("ai2d", "test"),),
        credit=_number("exact_match"),
        is_mean=True,
        note="pictures with masked labels",
    ),
    Benchmark(
        "mmstar",
        ("average",),
        1.0,
        (Source("Lin-Chen/MMStar", None, "val"),),
        credit=_score_in("average"),
        estimate=intervals.mean_of_means("average", "l2_category"),
        note="mean over 18 categories; the reading of letters changed in lmms-eval 0.7.2",
    ),
    Benchmark(
        "mmmu_val",
        ("mmmu_acc",),
        1.0,
        MMMU,
        credit=_mmmu,
        is_mean=True,
        note="an answer that names no option is replaced by a random one (seeded)",
    ),
)

_OTHERS = (
    Benchmark(
        "mathvista_testmini_format",
        ("llm_as_judge_eval",),
        100.0,
        MATHVISTA,
        judge="server",
        credit=lambda sample: float(sample["llm_as_judge_eval"]["true_false"]),
        is_mean=True,
        unjudged=_not_extracted,
        note="a judge extracts the answer, unless it is a bare number or exactly one choice",
    ),
    Benchmark(
        "hallusion_bench_image",
        ("aAcc",),
        100.0,
        HALLUSION,
        judge="openai",
        note="the judge reads every answer; it is asked for under the name gpt-4",
    ),
    Benchmark(
        "hallusion_bench_rules",
        ("aAcc",),
        100.0,
        HALLUSION,
        credit=_score_in("aAcc"),
        note=f"yes or no by rules, no judge, not comparable with hallusion_bench_image; {OWN}",
    ),
    Benchmark(
        "mmvet",
        ("gpt_eval_score",),
        100.0,
        (_hub("MMVet", "test"),),
        judge="server",
        credit=_score_in("gpt_eval_score"),
        is_mean=True,
        unjudged=lambda sample: not sample["gpt_eval_score"]["eval_model"],
    ),
    Benchmark(
        "llava_in_the_wild",
        ("gpt_eval_llava_all",),
        100.0,
        (_hub("llava-bench-in-the-wild", "train"),),
        judge="server",
        unjudged=lambda sample: min(sample["gpt_eval_llava_all"]["scores"]) < 0,
        note="relative to GPT-4's answers, can exceed 100",
    ),
    Benchmark(
        "mmerealworld_lite",
        ("mme_realworld_score",),
        1.0,
        (Source("yifanzhang114/MME-RealWorld-lite-lmms-eval", None, "train"),),
    ),
    Benchmark(
        "ocrbench",
        ("ocrbench_accuracy",),
        1.0,
        (Source("echo840/OCRBench", None, "test"),),
        credit=_score_in("ocrbench_accuracy"),
        whole=True,
    ),
    Benchmark(
        "infovqa_val",
        ("anls",),
        1.0,
        (_hub("DocVQA", "validation", "InfographicVQA"),),
        credit=_number("anls"),
        is_mean=True,
    ),
    Benchmark(
        "mmmu_pro_standard",
        ("mmmu_acc",),
        1.0,
        (Source("MMMU/MMMU_Pro", "standard (10 options)", "test"),),
    ),
    Benchmark(
        "seedbench_2_plus",
        ("seedbench_2_plus_all",),
        1.0,
        (Source("doolayer/SEED-Bench-2-Plus", None, "test"),),
        credit=_same_letter("seedbench_2_plus_all"),
        is_mean=True,
    ),
    Benchmark(
        "seedbench",
        ("seed_all",),
        1.0,
        (_hub("SEED-Bench", "test"),),
        credit=_same_letter("seed_all"),
        is_mean=True,
        note="pictures and frames of videos; seed_image is the part with one picture",
    ),
    Benchmark(
        "vqav2_val",
        ("exact_match",),
        1.0,
        (_hub("VQAv2", "validation"),),
        credit=_number("exact_match"),
        is_mean=True,
        note="LLaVA's published score is test-dev (server), and mix665k holds VQAv2's training split",
    ),
    Benchmark(
        "vizwiz_vqa_val",
        ("exact_match",),
        1.0,
        (_hub("VizWiz-VQA", "val"),),
        credit=_number("exact_match"),
        is_mean=True,
        note="LLaVA's published score is of the test split (server)",
    ),
    Benchmark(
        "mmbench_cn_dev_rules",
        ("gpt_eval_score",),
        100.0,
        (_hub("MMBench", "dev", "cn"),),
        credit=_mmbench,
        estimate=_mmbench_estimate,
        note=f"letters by rules, no judge; {OWN}",
    ),
)

_LOCAL = tuple(
    Benchmark(
        task.name, (task.metric,), task.scale, (), credit=_local(task.name), is_mean=True, note="records in --data"
    )
    for task in map(LOCAL_TASKS.get, LOCAL_TASKS.names())
)

BENCHMARKS = _CORE + _OTHERS + _LOCAL

_LIBMOE = (
    *("ai2d", "textvqa_val", "gqa", "mmbench_en_dev_static", "hallusion_bench_rules", "mathvista_testmini_format"),
    *("mmmu_val", "mmstar", "pope", "mme", "mmerealworld_lite", "ocrbench"),
)

SUITES = (
    Suite(
        "core", "nine public benchmarks without a judge, TextVQA and POPE in two readings", tuple(b.name for b in _CORE)
    ),
    Suite(
        "libmoe12",
        "LibMoE's twelve; MMBench and HallusionBench by rules, MathVista needs a judge",
        _LIBMOE,
    ),
    Suite(
        "libmoe16",
        "the sixteen of LibMoE's result file, likewise",
        (*_LIBMOE, "infovqa_val", "mmmu_pro_standard", "scienceqa_img", "seedbench_2_plus"),
    ),
    Suite(
        "llava15",
        "LLaVA-1.5's twelve; public validation splits of VQAv2 and VizWiz, two need a judge",
        (
            *("vqav2_val", "gqa", "vizwiz_vqa_val", "scienceqa_img", "textvqa_val_ocr", "pope_first_sentence", "mme"),
            *("mmbench_en_dev_static", "mmbench_cn_dev_rules", "seedbench", "llava_in_the_wild", "mmvet"),
        ),
    ),
    Suite(
        "judge",
        "four that a language model judges",
        ("mathvista_testmini_format", "hallusion_bench_image", "mmvet", "llava_in_the_wild"),
    ),
    Suite("quickstart", "our three, from records in --data", tuple(LOCAL_TASKS.names())),
)
