"""The hub, without a network: pushing, the model card, and loading from what was downloaded before."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from te_quant import GPT, GPTConfig, Segment, measure_equivariance
from te_quant.autoencoder import AutoencoderConfig, VQAutoencoder
from te_quant.tables import Table

hub = pytest.importorskip("huggingface_hub")
SMALL = AutoencoderConfig(base_channels=4, channel_multipliers=(1, 2), attention=False, num_codes=8, code_dim=4)
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class _Repository:
    """A repository as the cache of the hub keeps it, and the calls that change it."""

    cache: Path
    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    @property
    def root(self) -> Path:
        return self.cache / "models--owner--name"

    @property
    def files(self) -> Path:
        return self.root / "snapshots" / COMMIT

    def add(self, folder: Path, revision: str = "main") -> None:
        shutil.copytree(folder, self.files, dirs_exist_ok=True)
        (self.root / "refs").mkdir(exist_ok=True)
        (self.root / "refs" / revision).write_text(COMMIT)

    def api(self, token: object = None) -> Any:
        """The part of HfApi that pushing may call; whatever else it called would fail."""

        def record(name: str, answer: Any = None) -> Any:
            def call(repo_id: str, *args: object, **options: object) -> object:
                self.calls.append((name, {"repo_id": repo_id, "args": args, **options}))
                return answer(options) if callable(answer) else answer

            return call

        def upload(options: dict[str, Any]) -> object:
            self.add(Path(options["folder_path"]), options["revision"] or "main")
            return SimpleNamespace(commit_url=f"https://hub/owner/name/commit/{COMMIT}")

        self.calls.append(("HfApi", {"token": token}))
        return SimpleNamespace(
            create_repo=record("create_repo"),
            create_branch=record("create_branch"),
            file_exists=record("file_exists", lambda _: (self.files / "README.md").exists()),
            upload_folder=record("upload_folder", upload),
        )


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> _Repository:
    """An empty one; nothing reaches the network."""
    found = _Repository(tmp_path / "cache")
    monkeypatch.setattr(hub, "HfApi", found.api)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    return found


@pytest.fixture
def model() -> VQAutoencoder:
    return VQAutoencoder(SMALL).eval()


def test_a_pushed_model_is_loaded_offline(model: VQAutoencoder, repository: _Repository) -> None:
    """From the library's own cache in its own offline mode: the same bits, in evaluation mode."""
    url = model.push_to_hub("owner/name")
    assert url == f"https://hub/owner/name/commit/{COMMIT}"
    again = VQAutoencoder.from_pretrained("owner/name", cache_dir=repository.cache)
    images = torch.rand(1, 3, 8, 8)
    assert not again.training
    assert torch.equal(again(images).reconstruction, model(images).reconstruction)


def test_pushing_is_one_commit_of_three_files(model: VQAutoencoder, repository: _Repository) -> None:
    """Nothing is uploaded file by file, so no reader sees half a model."""
    model.push_to_hub("owner/name", private=True, token="secret", commit_message="First")
    assert sorted(path.name for path in repository.files.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    names = [name for name, _ in repository.calls]
    assert names == ["HfApi", "create_repo", "file_exists", "upload_folder"]
    calls = dict(repository.calls)
    assert calls["HfApi"] == {"token": "secret"}
    assert calls["create_repo"] == {"repo_id": "owner/name", "args": (), "private": True, "exist_ok": True}
    assert calls["upload_folder"]["commit_message"] == "First"


def test_a_revision_is_a_branch_of_its_own(model: VQAutoencoder, repository: _Repository) -> None:
    """It is made where it does not exist, and loading names it; the default branch does not have it."""
    model.push_to_hub("owner/name", revision="v2")
    assert dict(repository.calls)["create_branch"]["branch"] == "v2"
    VQAutoencoder.from_pretrained("owner/name", revision="v2", cache_dir=repository.cache)
    with pytest.raises(FileNotFoundError, match=r"'owner/name' without config\.json, or it was not downloaded"):
        VQAutoencoder.from_pretrained("owner/name", cache_dir=repository.cache)


def test_a_card_of_the_owner_stays(model: VQAutoencoder, repository: _Repository) -> None:
    """Pushing weights again leaves it; a card that is passed replaces it."""
    model.push_to_hub("owner/name", card="mine")
    model.push_to_hub("owner/name")
    assert (repository.files / "README.md").read_text() == "mine"
    model.push_to_hub("owner/name", card="newer")
    assert (repository.files / "README.md").read_text() == "newer"


def test_a_model_that_cannot_be_saved_makes_no_repository(
    model: VQAutoencoder, repository: _Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saving comes first."""
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match="safetensors must be installed"):
        model.push_to_hub("owner/name")
    assert [name for name, _ in repository.calls] == ["HfApi"]


def test_the_card_carries_the_tables_of_reports(model: VQAutoencoder) -> None:
    """Each under its title, as the report writes itself, behind the header that the hub reads."""
    report = measure_equivariance(
        model.encode_to_indices,
        torch.rand(1, 3, 8, 8) * 2 - 1,
        protocol="circular",
        stride=2,
        num_codes=8,
        variants={},
        resamples=0,
    )
    card = model.model_card("owner/name", reports={"Equivariance": report}, license_name="mit")
    assert card.startswith("---\nlicense: mit\nlibrary_name: te_quant\ntags:\n")
    assert f"\n## Equivariance\n\n{report.to_markdown().rstrip()}\n" in card
    assert "VQAutoencoder.from_pretrained('owner/name')" in card
    assert "## Equivariance" not in model.model_card("owner/name")


def test_the_header_of_a_card_is_what_the_hub_parses(model: VQAutoencoder) -> None:
    """Read by its own client."""
    data = hub.ModelCard(model.model_card("owner/name", license_name="mit")).data
    assert (data.library_name, data.license, data.tags[0]) == ("te_quant", "mit", "image-tokenizer")


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        (
            {"reports": {"Loss": 0.1}},
            ValueError,
            r"reports\['Loss'\] must be a report with .*, got float",
        ),
        ({"reports": [1]}, TypeError, r"reports must be a mapping from titles to reports, got \[1\]"),
        ({"license_name": 3}, TypeError, "license_name must be an identifier of the hub such as 'mit', or None"),
    ],
)
def test_a_card_refuses_what_it_cannot_write(
    model: VQAutoencoder, options: dict[str, Any], error: type[Exception], match: str
) -> None:
    """By name."""
    with pytest.raises(error, match=match):
        model.model_card("owner/name", **options)


@pytest.mark.parametrize("repo_id", ["name", "a/b/c", "./name", 3])
def test_pushing_needs_an_owner_and_a_name(model: VQAutoencoder, repository: _Repository, repo_id: object) -> None:
    """Before anything is written; a card needs them too."""
    error = ValueError if isinstance(repo_id, str) else TypeError
    for call in (model.push_to_hub, model.model_card):
        with pytest.raises(error, match="repo_id must be a hub id 'owner/name', got"):
            call(repo_id)
    assert not repository.calls


def test_pushing_without_the_client_says_what_to_install(
    model: VQAutoencoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The extra is named."""
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"huggingface_hub must be installed to push to 'a/b'.*te_quant\[hub\]"):
        model.push_to_hub("a/b")


def answer(kind: type[Exception]) -> Exception:
    """An error as the client raises it."""
    import inspect

    response = SimpleNamespace(headers={}, request=None, status_code=404)
    takes = "response" in inspect.signature(kind).parameters
    return kind("Several\nlines.", response=response) if takes else kind("Several\nlines.")


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (
            "RepositoryNotFoundError",
            "no folder has this name, and the repository does not exist or is private; pass token=... to see it.",
        ),
        ("GatedRepoError", "source must be open to you, got 'owner/name' at revision 'v3', which is gated"),
        ("RevisionNotFoundError", "revision must exist, got 'owner/name' at revision 'v3'."),
        ("RemoteEntryNotFoundError", "'owner/name' at revision 'v3' without config.json."),
        (
            "LocalEntryNotFoundError",
            "got no folder named 'owner/name' at revision 'v3', and no answer from the hub.",
        ),
    ],
)
def test_every_answer_of_the_hub_is_one_sentence(monkeypatch: pytest.MonkeyPatch, kind: str, told: str) -> None:
    """The same error as for a folder that is not there, without the lines of the client."""

    def refuse(**_: object) -> str:
        raise answer(getattr(hub.errors, kind))

    monkeypatch.setattr(hub, "hf_hub_download", refuse)
    with pytest.raises(FileNotFoundError, match=re.escape(told)) as got:
        VQAutoencoder.from_pretrained("owner/name", revision="v3")
    assert "\n" not in str(got.value)


def test_offline_says_that_nothing_is_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The file may exist on the hub, which was not asked."""

    def refuse(**_: object) -> str:
        raise answer(hub.errors.LocalEntryNotFoundError)

    monkeypatch.setattr(hub, "hf_hub_download", refuse)
    told = "existing folder or a hub id whose repository holds config.json and model.safetensors, got 'owner/name'"
    told += " without config.json, or it was not downloaded before and offline mode allows no download."
    with pytest.raises(FileNotFoundError, match=re.escape(told)):
        VQAutoencoder.from_pretrained("owner/name", local_files_only=True)


def test_repositories_of_diffusers_name_their_loader(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The repository has a config, but no weights of the name that this library writes."""
    (tmp_path / "config.json").write_text('{"_class_name": "VQModel"}')

    def fetch(*, filename: str, **_: object) -> str:
        if filename != "config.json":
            raise answer(hub.errors.RemoteEntryNotFoundError)
        return str(tmp_path / filename)

    monkeypatch.setattr(hub, "hf_hub_download", fetch)
    told = "without model.safetensors; config.json names a VQModel of diffusers: load it with"
    with pytest.raises(FileNotFoundError, match=re.escape(told)):
        VQAutoencoder.from_pretrained("owner/name")


# A GPT


@pytest.fixture
def gpt() -> GPT:
    segments = (Segment("text", 40, (6,), "learned"), Segment("image", 1600, (4, 3), "axial"))
    return GPT(GPTConfig(segments, width=8, depth=1, num_heads=2)).eval()


def test_a_pushed_gpt_is_loaded_offline(gpt: GPT, repository: _Repository) -> None:
    """In one commit with its card, and the same bits come back."""
    url = gpt.push_to_hub("owner/name", private=True, token="secret", revision="v2", commit_message="First")
    assert url == f"https://hub/owner/name/commit/{COMMIT}"
    names = [name for name, _ in repository.calls]
    assert names == ["HfApi", "create_repo", "create_branch", "file_exists", "upload_folder"]
    calls = dict(repository.calls)
    assert (calls["HfApi"]["token"], calls["create_repo"]["private"]) == ("secret", True)
    assert (calls["upload_folder"]["commit_message"], calls["upload_folder"]["revision"]) == ("First", "v2")
    assert (repository.files / "README.md").read_text() == gpt.model_card("owner/name")
    again = GPT.from_pretrained("owner/name", revision="v2", cache_dir=repository.cache)
    tokens = torch.randint(40, (2, 18))
    assert not again.training
    assert torch.equal(again(tokens), gpt(tokens))


def test_a_card_of_a_gpt_that_is_passed_is_uploaded(gpt: GPT, repository: _Repository) -> None:
    """And stays when weights are pushed again."""
    gpt.push_to_hub("owner/name", card="mine")
    gpt.push_to_hub("owner/name")
    assert (repository.files / "README.md").read_text() == "mine"


def test_the_card_of_a_gpt_says_what_it_is(gpt: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its segments and sizes, the tables of reports, and code that runs."""
    table = Table(["epoch", "loss"], [["1", "0.25"]])
    card = gpt.model_card("owner/name", reports={"Loss": table}, license_name="mit")
    data = hub.ModelCard(card).data
    assert (data.library_name, data.license, data.tags) == ("te_quant", "mit", ["gpt", "image-tokens"])
    parameters = sum(parameter.numel() for parameter in gpt.parameters())
    for row in (
        "| segment `text` | 6 tokens of a vocabulary of 40 |",
        "| segment `image` | 4 x 3 tokens of a vocabulary of 1,600 |",
        "| attention heads | 2 |",
        f"| parameters | {parameters:,} |",
    ):
        assert row in card.splitlines()
    assert f"\n## Loss\n\n{table.to_markdown().rstrip()}\n" in card
    monkeypatch.setattr(GPT, "from_pretrained", lambda name: {"owner/name": gpt}[name])
    names: dict[str, Any] = {}
    exec(card.split("```")[1].removeprefix("python"), names)
    assert names["tokens"].shape == (1, 18)


def test_a_card_of_a_gpt_refuses_what_is_no_report(gpt: GPT) -> None:
    """As that of an autoencoder."""
    with pytest.raises(ValueError, match=r"reports\['Loss'\] must be a report with to_markdown\(\), got float"):
        gpt.model_card("owner/name", reports={"Loss": 0.1})  # type: ignore[dict-item]


@pytest.mark.slow
def test_the_variable_of_the_hub_is_enough(model: VQAutoencoder, repository: _Repository) -> None:
    """HF_HUB_OFFLINE=1 and HF_HUB_CACHE in the environment of a fresh interpreter."""
    model.push_to_hub("owner/name")
    code = "import te_quant; print(te_quant.VQAutoencoder.from_pretrained('owner/name').config.num_codes)"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(repository.cache)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "8\n"), done.stderr
