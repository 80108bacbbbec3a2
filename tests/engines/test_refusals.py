"""What a paged cache would serve wrongly is refused when it is loaded, by name and with the reason."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from zoo import PLAIN, SHAPE, SIZE, VOCABULARY, WINDOW, ZOO, tiny_model

from kvprefetch.engines.attention import Backend, Shape, sdpa_gathered
from kvprefetch.engines.batch import PagedBatch
from kvprefetch.engines.engine import open_engine
from kvprefetch.engines.load import load_model, prepare
from kvprefetch.engines.selftest import page_shape, self_test
from kvprefetch.engines.support import why_refused
from kvprefetch.errors import SettingsError, UnknownModel, UnsupportedModel
from kvprefetch.settings import EngineSettings, PoolSettings, Settings

SETTINGS = Settings(
    pool=PoolSettings(size="1MiB", block_tokens=8), engine=EngineSettings(device="cpu", chunk_tokens=32)
)
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
    "original_max_position_embeddings": 64,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}

REFUSED: dict[str, tuple[str, Callable[[], Any]]] = {
    "llama, dynamic rope": ("RoPE of type dynamic", lambda: hf.LlamaConfig(**SHAPE, **PLAIN, rope_parameters=DYNAMIC)),
    "phi3, longrope": (
        "RoPE of type longrope",
        lambda: hf.Phi3Config(**SHAPE, **PLAIN, rope_parameters=LONG, original_max_position_embeddings=64),
    ),
    "gemma3, dynamic rope in one kind of layer": (
        "RoPE of type dynamic",
        lambda: hf.Gemma3TextConfig(
            **SHAPE,
            **PLAIN,
            head_dim=16,
            layer_types=["sliding_attention", "full_attention"],
            rope_parameters={
                "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
                "full_attention": DYNAMIC,
            },
        ),
    ),
    "llama4": (
        "layers of kind chunked_attention",
        lambda: hf.Llama4TextConfig(
            **SHAPE, **PLAIN, head_dim=8, num_local_experts=2, attention_chunk_size=16, intermediate_size_mlp=48
        ),
    ),
    "qwen3-next": (
        "layers of kind linear_attention",
        lambda: hf.Qwen3NextConfig(
            **SHAPE,
            **PLAIN,
            **EXPERTS,
            head_dim=16,
            num_experts=4,
            shared_expert_intermediate_size=24,
            linear_num_key_heads=2,
            linear_num_value_heads=2,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            layer_types=["linear_attention", "full_attention"],
        ),
    ),
    "gpt-oss": (
        "layer 0 needs s_aux",
        lambda: hf.GptOssConfig(
            **SHAPE,
            **PLAIN,
            head_dim=16,
            num_local_experts=4,
            num_experts_per_tok=2,
            layer_types=["sliding_attention", "full_attention"],
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        ),
    ),
    "stablelm": ("AttentionInterface", lambda: hf.StableLmConfig(**SHAPE, **PLAIN)),
    "gptj": (
        "AttentionInterface",
        lambda: hf.GPTJConfig(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=512, rotary_dim=4),
    ),
    "falcon": ("AttentionInterface", lambda: hf.FalconConfig(**SIZE)),
    "bloom": ("AttentionInterface", lambda: hf.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4)),
    "nemotron": ("keyword arguments are dropped", lambda: hf.NemotronConfig(**SHAPE, **PLAIN)),
    "diffllama": (r"layers \[0, 0, 1, 1\], each must come once", lambda: hf.DiffLlamaConfig(**SHAPE, **PLAIN)),
    "doge": ("a mask of its own", lambda: hf.DogeConfig(**SHAPE, **PLAIN)),
    "deepseek-v3": (
        "keys of 16 and values of 8 dims",
        lambda: hf.DeepseekV3Config(
            **{**SHAPE, "num_key_value_heads": 4},
            **PLAIN,
            **EXPERTS,
            q_lora_rank=16,
            kv_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=8,
            n_routed_experts=4,
            n_group=1,
            topk_group=1,
        ),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_family_that_would_be_wrong_is_refused_by_name(name: str) -> None:
    reason, config = REFUSED[name]
    model = tiny_model(config())
    if reason == "AttentionInterface" and model.is_backend_compatible():
        # newer releases of transformers have moved the family to the interface: the self-test has found it right
        assert open_engine(prepare(model, None, name), SETTINGS).loaded.name == name
        return
    with pytest.raises(UnsupportedModel, match=f"^{name}.*{reason}"):
        open_engine(prepare(model, None, name), SETTINGS)


def test_an_encoder_decoder_is_refused() -> None:
    config = hf.T5Config(vocab_size=VOCABULARY, d_model=32, num_layers=1, d_kv=8, d_ff=32, num_heads=4)
    with pytest.raises(UnsupportedModel, match="t5 is an encoder-decoder"):
        prepare(hf.T5ForConditionalGeneration(config), None, "t5")


def test_a_model_of_pictures_and_text_is_refused() -> None:
    assert "not a text-only decoder" in (why_refused(hf.Gemma3Config()) or "")


def test_a_refused_config_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    """There are no weights in this folder at all."""
    REFUSED["llama, dynamic rope"][1]().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match="dynamic"):
        load_model(tmp_path, SETTINGS.engine)


# -- the self-test has the last word ---------------------------------------------------------------------
def proved(model: Any, backend: Backend) -> None:
    loaded = prepare(model, None, "liar")
    self_test(loaded, page_shape(loaded, 8), backend)


def forgets_the_past(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: PagedBatch, shape: Shape
) -> torch.Tensor:
    """Right without a past; behind one, a query sees what torch's top-left causal flag lets it see."""
    out, at = torch.empty_like(q), 0
    for row, table in zip(batch.rows, batch.tables, strict=True):
        seen = [x[table].flatten(0, 1)[: row.end].transpose(0, 1) for x in (k, v)]
        mine = q[at : at + len(row.tokens)].transpose(0, 1)
        found = torch.nn.functional.scaled_dot_product_attention(
            mine, *seen, is_causal=len(row.tokens) > 1, scale=shape.scale, enable_gqa=True
        )
        out[at : at + len(row.tokens)] = found.transpose(0, 1)
        at += len(row.tokens)
    return out


def sees_one_too_many(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: PagedBatch, shape: Shape
) -> torch.Tensor:
    """Counts a window's tokens without the query itself."""
    window = None if shape.window is None else shape.window + 1
    return sdpa_gathered(q, k, v, batch, Shape(shape.scale, window, shape.softcap))


def forgets_the_cap(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: PagedBatch, shape: Shape) -> torch.Tensor:
    """Ignores the soft cap."""
    return sdpa_gathered(q, k, v, batch, Shape(shape.scale, shape.window, None))


@pytest.mark.parametrize(
    ("name", "backend", "run"),
    [
        ("llama", forgets_the_past, "split"),
        ("mistral, windows", sees_one_too_many, "cold"),
        ("gemma2, soft caps", forgets_the_cap, "cold"),
    ],
)
def test_the_self_test_catches_a_wrong_backend(name: str, backend: Backend, run: str) -> None:
    proved(tiny_model(ZOO[name]()), sdpa_gathered)
    with pytest.raises(UnsupportedModel, match=f"{run} paged logits differ .* served wrongly"):
        proved(tiny_model(ZOO[name]()), backend)


def test_rounding_in_bf16_is_not_taken_for_wrongness_and_wrongness_not_for_rounding() -> None:
    """Thirty layers: the worst of 4,096 logits is off by more than a tenth of their spread, and all is well."""
    config = hf.LlamaConfig(**{**SHAPE, "num_hidden_layers": 30, "vocab_size": 4_096}, **PLAIN)
    proved(tiny_model(config).to(torch.bfloat16), sdpa_gathered)
    for name, backend in (("llama", forgets_the_past), ("mistral, windows", sees_one_too_many)):
        with pytest.raises(UnsupportedModel, match="served wrongly"):
            proved(tiny_model(ZOO[name]()).to(torch.bfloat16), backend)


class MixesNeighbours(torch.nn.Module):
    """An MLP that also looks at the token before: state between forwards that no page holds."""

    def __init__(self, mlp: torch.nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        before = torch.nn.functional.pad(hidden, (0, 0, 1, 0))[:, :-1]
        return self.mlp(hidden + before)


class StretchesWithLength(torch.nn.Module):
    """RoPE whose frequencies depend on how long the forward is, and of no type that a config names."""

    def __init__(self, rope: torch.nn.Module) -> None:
        super().__init__()
        self.rope = rope

    def forward(self, hidden: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        stretch = 1 + float(position_ids.max()) / 16
        return self.rope(hidden, position_ids / stretch)


def mixing() -> Any:
    model = tiny_model(ZOO["llama"]())
    model.model.layers[0].mlp = MixesNeighbours(model.model.layers[0].mlp)
    return model


def stretching() -> Any:
    model = tiny_model(ZOO["llama"]())
    model.model.rotary_emb = StretchesWithLength(model.model.rotary_emb)
    return model


@pytest.mark.parametrize("model", [mixing, stretching])
def test_the_self_test_catches_a_model_whose_state_no_page_holds(model: Callable[[], Any]) -> None:
    """Cold it is right: only going on behind a prefix shows it."""
    with pytest.raises(UnsupportedModel, match=r"llama.*split paged logits differ"):
        proved(model(), sdpa_gathered)


def test_the_self_test_crosses_the_window() -> None:
    """A window that is never reached would hide that it is not applied."""
    config = ZOO["mistral, windows"]()
    config.sliding_window = 10 * WINDOW
    with pytest.raises(UnsupportedModel, match=f"at {10 * WINDOW + 24} tokens"):
        proved(tiny_model(config), sees_one_too_many)


# -- nothing to load -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "source", ["{}/no/such/folder", "{}/model.gguf", "./no-such-folder", "~no/such", "a/b/c", "x.gguf"]
)
def test_a_path_that_is_not_there_is_unknown_and_not_asked_of_the_hub(source: str, tmp_path: Path) -> None:
    with pytest.raises(UnknownModel, match=r"there is no such (folder|file)"):
        load_model(source.format(tmp_path), SETTINGS.engine)


def test_where_the_hub_cannot_be_reached_only_its_cache_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody listens at this address; the library's own attempts would go elsewhere, and take half a minute."""
    monkeypatch.setattr("kvprefetch.engines.load.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UnknownModel, match=r"nobody/no-such-model: .*couldn't find them in the cached files") as told:
        load_model("nobody/no-such-model", SETTINGS.engine)
    library_error = told.value.__cause__
    assert library_error is not None
    assert "outgoing traffic has been disabled" in str(library_error.__cause__)


def test_a_folder_without_a_model_is_unknown(tmp_path: Path) -> None:
    with pytest.raises(UnknownModel, match="no model could be loaded"):
        load_model(tmp_path, SETTINGS.engine)
    ZOO["llama"]().save_pretrained(tmp_path)
    with pytest.raises(UnknownModel, match="no model could be loaded"):
        load_model(tmp_path, SETTINGS.engine)


def test_broken_files_are_unknown_too(tmp_path: Path, tiny: Any) -> None:
    tiny_model(ZOO["llama"]()).save_pretrained(tmp_path)
    tiny.tokenizer.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    assert load_model(tmp_path, SETTINGS.engine).name == str(tmp_path)
    whole = weights.read_bytes()
    weights.write_bytes(whole[:1000])
    with pytest.raises(UnknownModel, match="no model could be loaded"):
        load_model(tmp_path, SETTINGS.engine)
    config = json.loads((tmp_path / "config.json").read_text())
    weights.write_bytes(whole)
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_size": 64}))
    with pytest.raises(UnknownModel, match="no model could be loaded"):
        load_model(tmp_path, SETTINGS.engine)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UnknownModel, match="no model could be loaded"):
        load_model(tmp_path, SETTINGS.engine)


def test_weights_that_the_files_lack_are_not_made_up(tmp_path: Path, tiny: Any) -> None:
    tiny_model(ZOO["llama"]()).save_pretrained(tmp_path)
    tiny.tokenizer.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UnknownModel, match=r"lack 1 of the model's weights, model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(tmp_path, SETTINGS.engine)


def test_devices_and_dtypes_that_are_not_there_are_named() -> None:
    with pytest.raises(SettingsError, match=r"engine.dtype 'int7'"):
        load_model("x", EngineSettings(dtype="int7"))
    with pytest.raises(SettingsError, match=r"engine.device 'abacus'"):
        load_model("x", EngineSettings(device="abacus"))
