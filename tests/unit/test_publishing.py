"""Results on the hub, which is mocked: what is uploaded, under whose eyes, and that a failure loses nothing."""

from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, ModelCard, RepoUrl, constants
from runs import SETTINGS
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import convexprune
from convexprune import _cli as cli
from convexprune import errors
from convexprune._api import result as publishing

QUICK: dict[str, Any] = SETTINGS | {"method": "magnitude"}


class Hub:
    """What a hub was told; `fault` is raised instead of taking an upload."""

    def __init__(self) -> None:
        self.made, self.files, self.given = list[tuple[str, Any]](), dict[str, bytes](), dict[str, Any]()
        self.fault: Exception | None = None

    def create_repo(self, _: HfApi, repo_id: str, *, private: bool | None, exist_ok: bool) -> RepoUrl:
        assert exist_ok
        self.made.append((repo_id, private))
        return RepoUrl(f"{constants.ENDPOINT}/{repo_id}")

    def upload_folder(
        self, _: HfApi, *, repo_id: str, folder_path: Path, allow_patterns: list[str], **given: Any
    ) -> None:
        if self.fault is not None:
            raise self.fault
        self.given = given | {"repo_id": repo_id}
        names = {path.relative_to(folder_path).as_posix(): path for path in folder_path.rglob("*") if path.is_file()}
        self.files = {
            name: path.read_bytes()
            for name, path in names.items()
            if any(fnmatch(name, each) for each in allow_patterns)
        }


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(publishing, "get_token", lambda: "hf_mine")
    monkeypatch.setattr(HfApi, "create_repo", lambda *given, **named: hub.create_repo(*given, **named))
    monkeypatch.setattr(HfApi, "upload_folder", lambda *given, **named: hub.upload_folder(*given, **named))
    return hub


@pytest.fixture(scope="module")
def finished(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> convexprune.PruneResult:
    return convexprune.prune(dense, output_dir=tmp_path_factory.mktemp("run") / "out", **QUICK)


def test_a_folder_is_uploaded_with_its_card_and_nothing_that_is_not_the_runs(finished: Any, hub: Hub):
    folder = finished.output_dir
    (folder / "diary.txt").write_text("mine")
    address = finished.push_to_hub("me/sparse", private=True, revision="trial")
    assert address == "https://huggingface.co/me/sparse" and hub.made == [("me/sparse", True)]
    written = {path.name for path in folder.iterdir()} - {"diary.txt"}
    assert hub.files.keys() == written >= {"README.md", "report.html", "report.json", "config.json"}
    assert ModelCard(hub.files["README.md"].decode()).data.to_dict()["library_name"] == "transformers"
    assert hub.given["revision"] == "trial" and "pruned by convexprune" in hub.given["commit_message"]


def test_whether_it_is_private_is_left_to_the_owner(finished: Any, hub: Hub):
    finished.push_to_hub("me/sparse")
    assert hub.made == [("me/sparse", None)]


def test_a_model_in_memory_is_uploaded_as_a_folder_would_be(dense: Path, hub: Hub, tmp_path: Path):
    result = convexprune.prune(AutoModelForCausalLM.from_pretrained(dense), **QUICK)
    result.push_to_hub("me/sparse")
    assert hub.files.keys() >= {
        "model.safetensors",
        "config.json",
        "recipe.yaml",
        "report.json",
        "README.md",
        "report.html",
    }
    for name, content in hub.files.items():
        (tmp_path / name).write_bytes(content)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.sparsity_config["sparsity_structure"] == "unstructured"
    assert convexprune.Report.from_json((tmp_path / "report.json").read_text()).sparsity == 0.5


def test_a_run_that_cannot_be_uploaded_is_kept_and_uploaded_later(dense: Path, tmp_path: Path, hub: Hub):
    hub.fault = ConnectionError("the line is dead")
    settings: dict[str, Any] = QUICK | {"output_dir": tmp_path / "out", "push_to_hub": "me/sparse", "pack": True}
    with pytest.raises(
        errors.OutputError, match=r"The upload to me/sparse failed \(ConnectionError: 'the line is dead'\)"
    ):
        convexprune.prune(dense, **settings)
    hub.fault = None
    result = convexprune.prune(dense, resume=True, **settings)
    assert hub.files.keys() == {path.name for path in (tmp_path / "out").iterdir()}
    assert any(name.endswith(".pack.safetensors") for name in hub.files) and result.report.packed


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("me/sparse/deep", "is no name on the hub"), ("a b", "is no name on the hub"), ("", "is no name on the hub"),
        ("me/sparse", "HF_HUB_OFFLINE is set"), ("me/sparse", "nobody has logged in"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_any_work(
    dense: Path, tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, name: str, fault: str
):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", "OFFLINE" in fault)
    monkeypatch.setattr(publishing, "get_token", lambda: None if "logged" in fault else "hf_mine")
    with pytest.raises(errors.RecipeError, match=fault):
        convexprune.prune(dense, output_dir=tmp_path / "out", push_to_hub=name, **QUICK)
    assert not (tmp_path / "out").exists() and not hub.made


def test_settings_that_say_nothing_are_refused(dense: Path, tmp_path: Path, hub: Hub):
    with pytest.raises(errors.RecipeError, match="Give output_dir, or call push_to_hub of the result"):
        convexprune.prune(dense, push_to_hub="me/sparse", **QUICK)
    with pytest.raises(errors.RecipeError, match="private is of push_to_hub"):
        convexprune.prune(dense, output_dir=tmp_path / "out", private=True, **QUICK)


def test_the_command_uploads(tiny_opt: Any, tmp_path: Path, hub: Hub):
    for saved in (tiny_opt.model, tiny_opt.tokenizer):
        saved.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("It was the best of times, it was the worst of times. " * 100)
    given = ["--dataset", tmp_path / "text.txt", "--method", "magnitude", "--nsamples", 2, "--seqlen", 16]
    given += ["--output", tmp_path / "out", "--push-to-hub", "me/sparse", "--private"]
    result = CliRunner().invoke(cli.app, ["prune", str(tmp_path / "model"), *map(str, given)])
    assert result.exit_code == 0 and "uploaded: https://huggingface.co/me/sparse" in result.output, result.output
    assert hub.made == [("me/sparse", True)]
