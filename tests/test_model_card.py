"""Model cards: what they say, who writes them, and how scores come into them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from llava_moe.cli import main
from llava_moe.convert import export_checkpoint, import_checkpoint
from llava_moe.evaluation import records
from llava_moe.model.assemble import load_model
from llava_moe.model.formats import Options
from llava_moe.model.modeling import CheckpointError
from llava_moe.model.upcycling import count_parameters
from llava_moe.model_card import CARD, SCORES, Origin, add_scores, known_bases, set_license, versions, write_card
from llava_moe.training import runner
from tests.tiny import write_llava_json
from tests.tiny_model import tiny_moe, write_tiny_checkpoint
from tests.training.runs import MOE_PARTS, make_config

ORIGIN = Origin("my model", "llava-moe train", ["runs/sft/model"], stage="moe")


@pytest.fixture
def checkpoint(moe_checkpoint: Path, tmp_path: Path) -> Path:
    """A sparse checkpoint with a card, to be changed."""
    shutil.copytree(moe_checkpoint, tmp_path / "checkpoint")
    write_card(tmp_path / "checkpoint", ORIGIN)
    return tmp_path / "checkpoint"


def read(folder: Path) -> Any:
    return ModelCard.load(folder / CARD)


def results(checkpoint: Path, **changes: Any) -> dict[str, Any]:
    """As `llava-moe eval` writes them."""
    return {
        "checkpoint": str(checkpoint),
        "checkpoint_sha256": records.sha256_of(records.checkpoint_files(checkpoint)),
        "data_sha256": {"local_gqa": "12ab"},
        "arguments": {"limit": None, "blank_images": False},
        "versions": versions(),
        "template": "chatml",
        "tasks": {
            "local_gqa": {"n": 60, "official": {"exact_match": 0.82}, "metric": "exact_match", "score": 0.82}
            | {"interval": [0.7, 0.9]},
            "mme": {"n": 20, "official": {"mme_perception": 1234.6, "mme_cognition": 210.0}},
        },
        **changes,
    }


def test_front_matter(checkpoint: Path) -> None:
    data = read(checkpoint).data.to_dict()
    assert data == {
        "library_name": "llava_moe",
        "pipeline_tag": "image-text-to-text",
        "license": "unknown",
        "tags": ["llava_moe", "moe"],
    }


def test_what_is_there_is_told(checkpoint: Path) -> None:
    text = read(checkpoint).text
    counted = count_parameters(load_model(checkpoint))
    for words in (
        "# my model",
        "A sparse (mixture-of-experts) vision-language model.",
        "import llava_moe  # registers the classes with transformers",
        "AutoModelForImageTextToText.from_pretrained(",
        "| vision tower | siglip_vision_model, num_hidden_layers 3, hidden_size 24",
        "| decoder | llama, num_hidden_layers 4, hidden_size 32",
        "| conversation | chatml |",
        "| image mode | square |",
        f"| parameters | {counted['total']:,} |",
        f"| parameters active for one token | {counted['active']:,} |",
        "| decoder | [0, 2] | 4 | top_k {'k': 2} | stacked",
        "| stage | moe |",
        "| made from | `runs/sft/model` |",
        f"| transformers | {versions()['transformers']} |",
        "Not scored yet.",
    ):
        assert words in text, words
    assert counted["active"] < counted["total"]


def test_the_code_on_the_card_works(checkpoint: Path) -> None:
    code = read(checkpoint).text.split("```python\n")[1].split("```")[0].replace("DIRECTORY", str(checkpoint))
    names: dict[str, Any] = {}
    exec(code, names)
    assert type(names["model"]).__name__ == "LlavaMoeForConditionalGeneration"
    assert type(names["processor"]).__name__ == "LlavaMoeProcessor"


def test_no_checkpoint_no_card(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        write_card(tmp_path, ORIGIN)
    assert not (tmp_path / CARD).exists()


def test_bases_are_hub_ids_alone(checkpoint: Path, tmp_path: Path) -> None:
    card = read(checkpoint)
    card.data.base_model = ["lmsys/vicuna-7b-v1.5"]
    card.save(checkpoint / CARD)
    (tmp_path / "bare").mkdir()
    snapshot = tmp_path / "models--openai--clip-vit-large-patch14-336" / "snapshots" / "ce19dc"
    snapshot.mkdir(parents=True)
    parents = [str(checkpoint), "google/siglip-base", str(tmp_path / "bare"), str(snapshot), "/no/where", "timm:x/y"]
    found = ["lmsys/vicuna-7b-v1.5", "google/siglip-base", "openai/clip-vit-large-patch14-336"]
    assert known_bases(parents) == found
    write_card(checkpoint, Origin("x", "y", parents))
    assert read(checkpoint).data.base_model == found


def test_cells_and_fences_hold(checkpoint: Path) -> None:
    recipe = "a: |\n  ```\n  b\n  ```\n"
    write_card(checkpoint, Origin("x", "y", facts={"a|b": "c\nd"}, recipe=recipe))
    text = read(checkpoint).text
    assert "| a\\|b | c d |" in text
    assert f"````yaml\n{recipe.strip()}\n````" in text


class TestScores:
    """`add_scores` and `llava-moe card`."""

    def test_they_come_in_and_the_rest_stays(self, checkpoint: Path) -> None:
        mine = read(checkpoint)
        mine.text = mine.text.replace("## Scores", "## Intended use\n\nPictures of shapes.\n\n## Scores")
        mine.text += "\nAn ending of mine.\n"
        mine.save(checkpoint / CARD)
        add_scores(checkpoint, results(checkpoint))
        card = read(checkpoint)
        assert "| local_gqa | 60 | exact_match | 82.0 % | 70.0 to 90.0 % |" in card.text
        assert (
            "| mme | 20 | mme_perception | 1234 |" in card.text or "| mme | 20 | mme_perception | 1235 |" in card.text
        )
        assert "Not scored yet" not in card.text
        assert "Pictures of shapes." in card.text
        assert card.text.rstrip().endswith("An ending of mine.")
        found = {(r.dataset_name, r.metric_type): r.metric_value for r in card.data.eval_results}
        assert found[("local_gqa", "exact_match")] == 0.82
        assert found[("mme", "mme_cognition")] == 210.0
        assert card.data.model_name == "my model"
        assert "model-index" in card.data.to_dict()

    def test_again_replaces_and_others_stay(self, checkpoint: Path) -> None:
        add_scores(checkpoint, results(checkpoint))
        again = results(checkpoint, arguments={"limit": 8, "blank_images": False})
        again["tasks"] = {"local_gqa": {**again["tasks"]["local_gqa"], "n": 8, "score": 0.5}}
        add_scores(checkpoint, again)
        text = read(checkpoint).text
        assert "| local_gqa | 8 (the first 8) | exact_match | 50.0 %" in text
        assert "82.0 %" not in text
        assert "| mme | 20 |" in text
        assert text.count("scores: begin") == 1
        assert json.loads((checkpoint / SCORES).read_text())["local_gqa"]["limit"] == 8

    def test_a_new_card_keeps_the_scores_that_lie_there(self, checkpoint: Path) -> None:
        add_scores(checkpoint, results(checkpoint))
        write_card(checkpoint, ORIGIN)
        assert "| local_gqa | 60 | exact_match | 82.0 %" in read(checkpoint).text

    def test_blank_pictures_are_no_score(self, checkpoint: Path) -> None:
        blank = results(checkpoint, arguments={"limit": None, "blank_images": True})
        with pytest.raises(CheckpointError, match="a baseline"):
            add_scores(checkpoint, blank)
        assert "Not scored yet" in read(checkpoint).text

    def test_somebody_elses_readme_is_left_alone(self, checkpoint: Path) -> None:
        (checkpoint / CARD).write_text("# Mine\n")
        with pytest.raises(CheckpointError, match=r"no README\.md that llava_moe wrote"):
            add_scores(checkpoint, results(checkpoint))
        assert (checkpoint / CARD).read_text() == "# Mine\n"

    def test_the_program(self, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        scores = tmp_path / "scores"
        scores.mkdir()
        (scores / "results.json").write_text(json.dumps(results(checkpoint)))
        main(["card", str(checkpoint), "--scores", str(scores), "--license", "apache-2.0"])
        assert "card: " in capsys.readouterr().out
        assert read(checkpoint).data.license == "apache-2.0"
        assert "82.0 %" in read(checkpoint).text
        (checkpoint / "generation_config.json").unlink()  # now it is another checkpoint
        for arguments, words in (
            (["--scores", str(scores)], "as it is now"),
            (["--scores", str(tmp_path)], "no results.json there"),
            ([], "nothing to do"),
        ):
            with pytest.raises(SystemExit) as stopped:
                main(["card", str(checkpoint), *arguments])
            assert stopped.value.code == 2
            assert words in capsys.readouterr().err

    def test_scoring_renews_the_card(self, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
        from llava_moe.evaluation.run import _renew_card

        _renew_card(checkpoint, results(checkpoint))
        assert "82.0 %" in read(checkpoint).text
        (checkpoint / CARD).unlink()
        _renew_card(checkpoint, results(checkpoint))
        assert "model card not renewed" in capsys.readouterr().out

    def test_the_license_needs_a_card(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"no README\.md"):
            set_license(tmp_path, "mit")


def test_training_writes_one(moe_checkpoint: Path, tmp_path: Path) -> None:
    data = write_llava_json(tmp_path / "data", 4)
    config = make_config(tmp_path, moe_checkpoint, data, stage={"name": "moe", "learning_rates": MOE_PARTS})
    final = runner.train(config)
    text = read(final).text
    for words in (
        "# out",
        "| made by | `llava-moe train` |",
        "| stage | moe |",
        f"| made from | `{moe_checkpoint}` |",
        "| steps | 2 |",
        f"- `{data[0]}`",
        "- all together: 4 records, 4 used",
    ):
        assert words in text, words
    recipe = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert recipe["train"]["max_steps"] == 2
    assert recipe["data"]["sources"][0]["path"] == str(data[0])
    pickles = [path.name for path in final.iterdir() if path.suffix in (".bin", ".pt", ".pkl")]
    assert pickles == []


def test_the_makers_write_one(dense_checkpoint: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"upcycle": {"decoder": {"num_experts": 4, "layers": "all"}}}))
    main(["upcycle", "--from", str(dense_checkpoint), str(recipe), "--to", str(tmp_path / "up")])
    text = read(tmp_path / "up").text
    assert "| made by | `llava-moe upcycle` |" in text
    assert "| decoder | [0, 1, 2, 3] | 4 | top_k" in text
    assert "num_experts: 4" in text
    assert "largest logit difference to the parent" in text

    export_checkpoint(tmp_path / "up", tmp_path / "stock", license="mit")
    stock = read(tmp_path / "stock")
    assert stock.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "license": "mit",
        "tags": ["llava_moe", "moe"],
    }
    counted = count_parameters(load_model(tmp_path / "up"))
    assert f"| parameters active for one token | {counted['active']:,} |" in stock.text
    assert "import llava_moe" not in stock.text
    assert "start point: upcycled by | decoder copy" in stock.text

    import_checkpoint(tmp_path / "stock", tmp_path / "back", Options())
    back = read(tmp_path / "back").text
    assert "| made by | `llava-moe import` |" in back
    assert f"| parameters active for one token | {counted['active']:,} |" in back


def test_a_grown_model_has_one(dense_checkpoint: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    section = {"depth": {"name": "stack"}, "target": {"num_hidden_layers": 8}}
    recipe.write_text(yaml.safe_dump({"grow": section}))
    main(["grow", "--from", str(dense_checkpoint), str(recipe), "--to", str(tmp_path / "grown")])
    text = read(tmp_path / "grown").text
    assert "| made by | `llava-moe grow` |" in text
    assert "num_hidden_layers 8" in text
    assert "A dense vision-language model." in text


def test_cards_do_not_change_what_a_checkpoint_is(tmp_path: Path) -> None:
    path = write_tiny_checkpoint(tmp_path / "checkpoint", tiny_moe())
    before = records.sha256_of(records.checkpoint_files(path))
    write_card(path, ORIGIN)
    add_scores(path, results(path))
    assert records.sha256_of(records.checkpoint_files(path)) == before
