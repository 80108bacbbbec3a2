"""Which models are served right from a paged cache; the others are refused by name, never served wrongly."""

from typing import Any

RIGHT_ROPE = {"default", "linear", "llama3", "yarn"}
RIGHT_LAYERS = {"full_attention", "sliding_attention"}


def why_refused(config: Any) -> str | None:
    """The reason to refuse a model of this transformers config, or None. The self-test has the last word."""
    name = getattr(config, "model_type", "?")
    if getattr(config, "is_encoder_decoder", False):
        return f"{name} is an encoder-decoder"
    if not hasattr(config, "vocab_size"):
        return f"{name} is not a text-only decoder"
    strange_layers = set(getattr(config, "layer_types", None) or ()) - RIGHT_LAYERS
    if strange_layers:
        return f"{name} has layers of kind {', '.join(sorted(strange_layers))}: their state is not paged KV"
    strange_rope = rope_types(config) - RIGHT_ROPE
    if strange_rope:
        return (
            f"{name} uses RoPE of type {', '.join(sorted(strange_rope))}: "
            "its keys depend on the total length, so a cached prefix would be wrong"
        )
    return None


def rope_parameters(config: Any) -> dict[str, Any]:
    """The config's RoPE settings; some models nest them per layer kind."""
    return dict(getattr(config, "rope_parameters", None) or {})


def rope_types(config: Any) -> set[str]:
    """All RoPE types that the model uses; empty without RoPE."""
    parameters = rope_parameters(config)
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return {str(group.get("rope_type", "default")) for group in nested or [parameters] if group}


def sliding_window(config: Any) -> int | None:
    """The widest sliding window that any layer applies."""
    window = getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", True) and isinstance(window, int) and window > 0:
        return window
    return None
