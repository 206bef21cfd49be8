"""The tiny models of the rows: MODELS makes the folder `m/NAME`. All are random; most are one decoder with a fault."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from architectures import classifier, llama, small_bert, small_mamba, small_t5
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, PreTrainedModel

from convexprune.adapters import EMBEDDED

DOWN = "model.layers.1.mlp.down_proj.weight"
EMBEDDING = "model.embed_tokens.weight"

Maker = Callable[[Path], object]


def saved(build: Callable[[], PreTrainedModel], tokenizer: bool = True) -> Maker:
    """Makes the folder of a model."""

    def make(path: Path) -> None:
        build().save_pretrained(path)
        if tokenizer:
            AutoTokenizer.from_pretrained(EMBEDDED).save_pretrained(path)

    return make


def changed(change: Callable[[Path], object]) -> Maker:
    """Makes the folder of the tiny decoder, changed by hand."""

    def make(path: Path) -> None:
        saved(llama)(path)
        change(path)

    return make


def with_words(path: Path, **settings: Any) -> None:
    """Other words in a config.json."""
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def configure(path: Path, **settings: Any) -> None:
    """Other words in the config.json of a model."""
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def with_config(**settings: Any) -> Maker:
    """The tiny decoder with other words in its config.json."""
    return changed(lambda path: configure(path, **settings))


def with_tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Maker:
    """The tiny decoder with one tensor changed, or None: without it."""

    def make(path: Path) -> None:
        file = path / "model.safetensors"
        tensors = load_file(file)
        new = change(tensors.pop(name))
        save_file(tensors if new is None else tensors | {name: new}, file, {"format": "pt"})

    return changed(make)


def with_file(name: str, content: Callable[[bytes], bytes]) -> Maker:
    """The tiny decoder with another content of one of its files, or a file more."""

    def change(path: Path) -> None:
        file = path / name
        file.write_bytes(content(file.read_bytes() if file.exists() else b""))

    return changed(change)


def first(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Another first entry."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[0] = value
        return tensor

    return change


def pickled(content: Any = None) -> Maker:
    """The tiny decoder as a pickle: of its weights, or of something else."""

    def change(path: Path) -> None:
        file = path / "model.safetensors"
        torch.save(load_file(file) if content is None else content, path / "pytorch_model.bin")
        file.unlink()

    return changed(change)


class Evil:
    """Makes a file called `executed` when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, ("executed", "w"))


def _brought(path: Path) -> None:
    """A configuration that names code of its own."""
    code = "from transformers import LlamaConfig, LlamaForCausalLM\nclass C(LlamaConfig): model_type = 'own'\n"
    (path / "own.py").write_text(code + "class M(LlamaForCausalLM): config_class = C\n")
    configure(path, model_type="own", auto_map={"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"})


def _named(path: Path) -> None:
    """A configuration of a known kind that names code which is there."""
    (path / "own.py").write_text("raise SystemError('it runs')\n")
    configure(path, auto_map={"AutoModelForCausalLM": "own.M"})


def shards(place: Callable[[int], str]) -> Maker:
    """The tiny decoder in two shards whose names in the index, and places, are those of `place`."""

    def change(path: Path) -> None:
        file = path / "model.safetensors"
        tensors, weight_map = load_file(file), {}
        for number, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2])):
            at = path / place(number)
            at.parent.mkdir(parents=True, exist_ok=True)
            save_file({name: tensors[name] for name in names}, at, {"format": "pt"})
            weight_map |= dict.fromkeys(names, place(number))
        file.unlink()
        index = {"metadata": {}, "weight_map": weight_map}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))

    return changed(change)


def _adapter(path: Path) -> None:
    config = {"peft_type": "LORA", "base_model_name_or_path": "m/llama", "r": 2, "target_modules": ["q_proj"]}
    (path / "adapter_config.json").write_text(json.dumps(config))
    save_file({"base_model.model.lm_head.lora_A.weight": torch.zeros(2, 64)}, path / "adapter_model.safetensors")


def _without(name: str) -> Maker:
    return changed(lambda path: (path / name).unlink())


def _dangling(path: Path) -> None:
    (path / "model.safetensors").unlink()
    (path / "model.safetensors").symlink_to("nowhere")


def _folder_for_weights(path: Path) -> None:
    (path / "model.safetensors").unlink()
    (path / "model.safetensors").mkdir()


def _fifo(path: Path) -> None:
    (path / "model.safetensors").unlink()
    os.mkfifo(path / "model.safetensors")


def _missing_shard(path: Path) -> None:
    shards(lambda number: f"model-0000{number + 1}-of-00002.safetensors")(path)
    (path / "model-00002-of-00002.safetensors").unlink()


def _inside(path: Path) -> None:
    """A checkpoint in a folder, as a trainer leaves it."""
    saved(lambda: llama(seed=1))(path / "z-checkpoint")


def _with_index(content: str) -> Maker:
    def make(path: Path) -> None:
        _missing_shard(path)
        (path / "model.safetensors.index.json").write_text(content)

    return make


def _overlapping(path: Path) -> None:
    """Two tensors of a shard in a folder of its own share their bytes."""
    shards(lambda number: f"sub/shard{number}.safetensors")(path)
    file = path / "sub/shard0.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    like = [name for name in header if name.endswith("norm.weight")]
    header[like[1]]["data_offsets"] = header[like[0]]["data_offsets"]
    new = json.dumps(header).encode()
    file.write_bytes(len(new).to_bytes(8, "little") + new + content[8 + length :])


def _broken_merge(content: bytes) -> bytes:
    tokenizer = json.loads(content)
    tokenizer["model"]["merges"][0] = ["no", "suchtoken"]
    return json.dumps(tokenizer).encode()


MODELS: dict[str, Maker] = {
    "llama": saved(llama),
    "llama2": saved(lambda: llama(seed=1)),
    "deep": saved(lambda: llama(4)),
    "width66": saved(lambda: llama(hidden_size=66, num_attention_heads=3, num_key_value_heads=3)),
    "smallvocab": saved(lambda: llama(vocab_size=512)),
    "zerolayer": saved(lambda: llama(0)),
    "f64": saved(lambda: llama().double()),
    "notok": saved(llama, tokenizer=False),
    "model with spaces é中": saved(llama),
    "[brackets]": saved(llama),
    "bert": saved(small_bert),
    "bertdec": saved(lambda: small_bert(decoder=True)),
    "t5": saved(small_t5),
    "mamba": saved(small_mamba),
    "seqcls": saved(classifier),
    "noconfig": _without("config.json"),
    "noweights": _without("model.safetensors"),
    "badconfig": with_file("config.json", lambda _: b"{not json"),
    "badtok": with_file("tokenizer.json", lambda _: b"{not json"),
    "badmerge": with_file("tokenizer.json", _broken_merge),
    "trunc": with_file("model.safetensors", lambda content: content[: len(content) // 2]),
    "garbage": with_file("model.safetensors", lambda _: b"garbage " * 1000),
    "emptyst": with_file("model.safetensors", lambda _: b""),
    "dangling": changed(_dangling),
    "weightsfolder": changed(_folder_for_weights),
    "fifo": changed(_fifo),
    "nan": with_tensor(DOWN, first(float("nan"))),
    "inf": with_tensor(DOWN, first(float("inf"))),
    "nanembed": with_tensor(EMBEDDING, first(float("nan"))),
    "missingtensor": with_tensor(DOWN, lambda _: None),
    "wrongshape": with_tensor(DOWN, lambda tensor: tensor[:, :-1].contiguous()),
    "dead": with_tensor("model.layers.0.input_layernorm.weight", lambda tensor: tensor.index_fill(0, torch.arange(8), 0)),
    "quantized": with_config(quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 128}),
    "quantbnb": with_config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
    "toomanylayers": with_config(num_hidden_layers=3, layer_types=None),
    "millionlayers": with_config(num_hidden_layers=1_000_000, layer_types=None),
    "unknownarch": with_config(model_type="nosuchmodel", architectures=["NoSuchModel"]),
    "textwidth": with_config(hidden_size="256"),
    "remote": changed(_brought),
    "named": changed(_named),
    "pickle": pickled(),
    "evil": pickled(Evil()),
    "lora": changed(_adapter),
    "inside": changed(_inside),
    "link": changed(lambda path: (path / "notes.txt").symlink_to("/etc/passwd")),
    "missingshard": _missing_shard,
    "subfolders": shards(lambda number: f"shards/m{number}.safetensors"),
    "samename": shards(lambda number: f"{'ab'[number]}/x.safetensors"),
    "traversal": shards(lambda number: "../outside/secret.safetensors" if number else "model-a.safetensors"),
    "overlapping": _overlapping,
    "absolute": lambda path: shards(lambda number: f"{path.absolute().parent}/secret{number}.safetensors")(path),
    "indextext": _with_index("{not json"),
    "indexlist": _with_index("[1, 2]"),
    "indexempty": _with_index("{}"),
    "indexnumbers": _with_index('{"weight_map": {"lm_head.weight": 1}}'),
}  # fmt: skip
