"""The warmed prefix is what the coming request really starts with, by real chat templates and tokenizers."""

from collections.abc import Iterator
from copy import copy
from functools import cache
from itertools import product, takewhile
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from kvprefetch.contexts import Context
from kvprefetch.engines.render import Renderer
from kvprefetch.errors import InvalidRequest

TEMPLATES = Path(__file__).parent / "templates"
BLOCK = 32
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
CHATML = ["<|im_start|>", "<|im_end|>"]
# name: how text is split, the special tokens (the first opens a text, the last ends a turn)
TOKENIZERS = {
    "smollm2": (GPT2, CHATML),
    "qwen3": (QWEN, [*CHATML, "<think>", "</think>", "<tool_call>", "</tool_call>"]),
    "llama31": (LLAMA3, ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]),
    "mistral": (GPT2, ["<s>", "</s>"]),
}
# so that line breaks, spaces and punctuation merge across the borders of messages, as they do in big vocabularies
CORPUS = [
    "system\n\nuser\n\nassistant\n\n\n\ntool\n\n\n What is the weather?\n  It is warm, 21 degrees in Utrecht.\n\n",
    '{"name": "weather", "parameters": {"city": "Utrecht"}}\n["a", "b"]\n"[1, 2]" "{\\"a\\": 1}" "\\n" "\'a\'" "7',
    "ware house warehouse warehouses [INST] [/INST] hello world 漢字 漢字 🙂 🙂🙂 é",
    "one\n\n\n\ntwo\n\n\n\nthree\n\n\n\n7\n\n\n\n",
] * 8

TOOLS = (
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a city.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    },
)
TEXTS = (
    "hello", "What now", "house", "ouse", "7", "2024-05", " hello", "  hello", "\nhello", "\n\nhello", "\n\n\n7",
    " \n hello", "\thello", "漢字", "🙂 fine", "é", '{"a": 1}', "[1, 2]", "['a']", "'a'", '"a"', "\\n", ".", "...\n",
    "-1", " ", "<think>",
)  # fmt: skip


@cache
def tokenizer(name: str) -> PreTrainedTokenizerFast:
    pattern, special = TOKENIZERS[name]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(CORPUS, trainer)
    if name in ("llama31", "mistral"):
        bos = (special[0], core.token_to_id(special[0]))
        core.post_processor = processors.TemplateProcessing(single=f"{special[0]} $A", special_tokens=[bos])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=special[0],
        eos_token="<|im_end|>" if special[0] == CHATML[0] else special[-1],
        chat_template=(TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8"),
        clean_up_tokenization_spaces=False,
    )


def said(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def call(content: str = "", **more: Any) -> dict[str, Any]:
    function = {"name": "weather", "arguments": {"city": "Utrecht"}}
    return said(
        "assistant", content, tool_calls=[{"id": "a1b2c3d4e", "type": "function", "function": function}], **more
    )


def result(content: str) -> dict[str, Any]:
    return said("tool", content, name="weather", tool_call_id="a1b2c3d4e")


def conversations(end: str) -> dict[str, list[dict[str, Any]]]:
    """Conversations, each ending in another way; every last text ends in `end`."""
    system, asked = said("system", "Be short."), said("user", "What is the weather?")
    thought = said("assistant", "It is warm.", reasoning_content="The user is in Utrecht.\nLook it up.")
    calling = call(reasoning_content="I must look it up.")
    return {
        "system": [said("system", f"Be short, in Utrecht{end}")],
        "user": [system, said("user", f"What is the ware{end}")],
        "user, no system": [said("user", f"What is the ware{end}")],
        "user, second turn": [system, asked, thought, said("user", f"And now?{end}")],
        "assistant": [system, asked, said("assistant", f"It is warm{end}")],
        "assistant, reasoning apart": [asked, said("assistant", f"Warm.{end}", reasoning_content="Utrecht, so.")],
        "assistant, reasoning within": [system, asked, said("assistant", f"<think>\nUtrecht.\n</think>\n\nWarm{end}")],
        "tool call": [system, asked, call()],
        "tool call, with reasoning": [asked, call(f"I look it up.{end}", reasoning_content="I must look it up.")],
        "tool": [system, asked, calling, result(f'{{"degrees": 21}}{end}')],
        "tool, plain": [asked, thought, asked, calling, result(f"21 degrees{end}")],
        "tool, second call": [system, asked, calling, result("21 degrees"), calling, result(f"22{end}")],
        "assistant, after a tool": [system, asked, calling, result("21"), said("assistant", f"21 degrees.{end}")],
    }


def follow_ups(messages: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Real requests that start with `messages`."""
    last = messages[-1]
    if last["role"] in ("user", "tool"):
        yield messages
    for text in TEXTS:
        if last["role"] == "tool" or "tool_calls" in last:
            yield [*messages, result(text)]
        else:
            yield [*messages, said("user", text)]


def shared(rows: list[list[int]]) -> int:
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*rows, strict=False)))


def check_prefix(renderer: Renderer, messages: list[dict[str, Any]], requests: Any, **more: Any) -> None:
    prefix = renderer.prefix(Context(tuple(messages), **more))
    prompts = [renderer.prompt(Context(tuple(request), **more)) for request in requests]
    assert len(prompts) > 1
    for prompt in prompts:
        assert prompt[: len(prefix)] == prefix, renderer.tokenizer.decode(prompt)
    assert len(prefix) >= shared(prompts) - BLOCK


def text_of(name: str, *messages: dict[str, Any], tools: tuple[Any, ...] = (), **options: Any) -> str:
    renderer = Renderer(tokenizer(name))
    return tokenizer(name).decode(renderer.prompt(Context(messages, tools, options)))


OPTIONS = [
    ("smollm2", {}),
    ("qwen3", {}),
    ("qwen3", {"enable_thinking": False}),
    ("llama31", {}),
    ("llama31", {"date_string": "1 Feb 2030"}),
    ("llama31", {"tools_in_user_message": False}),
]


@pytest.mark.parametrize("ending", conversations(""))
@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_every_request_that_continues_a_context_starts_with_its_prefix(
    name: str, options: dict[str, Any], ending: str
) -> None:
    renderer = Renderer(tokenizer(name))
    for end, tools in product(("", " ", "\n", "\n\n", " \n  "), ((), TOOLS)):
        messages = conversations(end)[ending]
        check_prefix(renderer, messages, follow_ups(messages), tools=tools, chat_template_kwargs=options)


@pytest.mark.parametrize("name", ["smollm2", "qwen3", "llama31"])
def test_the_prefix_holds_the_whole_document(name: str) -> None:
    document = "".join(f"Line {number} of the document is about warehouses.\n" for number in range(200))
    prefix = Renderer(tokenizer(name)).prefix(Context((said("system", document),), TOOLS))
    assert document.strip() in tokenizer(name).decode(prefix)


def test_the_tokenizers_merge_across_the_borders_of_messages() -> None:
    """Otherwise the stories here would be too easy."""
    for text in ("\n\n", "\n\n\n", ' "', '{"'):
        assert len(tokenizer("smollm2").encode(text, add_special_tokens=False)) == 1
    assert len(tokenizer("llama31").encode('"[', add_special_tokens=False)) == 1


def test_smollm2_brings_its_own_system_prompt() -> None:
    assert text_of("smollm2", said("user", "Hi")) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_qwen3_forgets_the_reasoning_of_earlier_turns_and_so_does_the_prefix() -> None:
    asked = said("user", "Hi")
    thought = said("assistant", "Hello.", reasoning_content="A greeting.")
    earlier = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>"
    assert text_of("qwen3", asked, thought, asked) == earlier + "user\nHi<|im_end|>\n<|im_start|>assistant\n"
    prefix = Renderer(tokenizer("qwen3")).prefix(Context((asked, thought)))
    assert tokenizer("qwen3").decode(prefix).startswith(earlier)


def test_qwen3_keeps_the_reasoning_of_a_turn_whose_tools_still_run_and_so_does_the_prefix() -> None:
    turn = (said("user", "Hi"), call(reasoning_content="Look it up."), result("21"))
    text = (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\nLook it up.\n</think>\n\n<tool_call>\n"
        '{"name": "weather", "arguments": {"city": "Utrecht"}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\n21\n</tool_response>"
    )
    assert text_of("qwen3", *turn) == text + "<|im_end|>\n<|im_start|>assistant\n"
    assert text_of("qwen3", *turn, result("22")).startswith(text + "\n<tool_response>\n22\n</tool_response><|im_end|>")
    for context in (turn[:2], turn):
        assert "Look it up." in tokenizer("qwen3").decode(Renderer(tokenizer("qwen3")).prefix(Context(context)))


def test_qwen3_without_thinking_starts_its_answer_with_an_empty_thought() -> None:
    text = text_of("qwen3", said("user", "Hi"), enable_thinking=False)
    assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


def test_qwen3_names_its_tools_in_the_system_message() -> None:
    text = text_of("qwen3", said("system", "Be short."), said("user", "Hi"), tools=TOOLS)
    assert text.startswith("<|im_start|>system\nBe short.\n\n# Tools\n\n")
    assert '<tools>\n{"type": "function", "function": {"name": "weather"' in text


def test_llama31_tells_the_date_and_puts_tools_into_the_first_user_message() -> None:
    asked = said("user", " Hi ")
    text = text_of(
        "llama31", said("system", "Be short."), asked, call(), result("21"), tools=TOOLS, date_string="1 May"
    )
    system, user, *rest = text.split("<|eot_id|>")
    assert system == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nEnvironment: ipython\n"
        "Cutting Knowledge Date: December 2023\nToday Date: 1 May\n\nBe short."
    )
    assert user.startswith("<|start_header_id|>user<|end_header_id|>\n\nGiven the following functions, ")
    assert user.endswith("}\n\nHi")
    assert rest == [
        '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "weather", "parameters": {"city": "Utrecht"}}',
        '<|start_header_id|>ipython<|end_header_id|>\n\n"21"',
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ]


@pytest.mark.parametrize("name", ["llama31", "mistral"])
def test_a_prompt_has_one_bos_though_template_and_tokenizer_both_add_it(name: str) -> None:
    bos = tokenizer(name).bos_token_id
    assert tokenizer(name).encode("Hi")[0] == bos
    context = Context((said("user", "Hi"),))
    for tokens in (Renderer(tokenizer(name)).prompt(context), Renderer(tokenizer(name)).prefix(context)):
        assert tokens[0] == bos
        assert tokens.count(bos) == 1


@pytest.mark.parametrize(
    "end", ["", " ", "\n", ".", " ware", " wareh", " 漢字", " 12", " [", " 漢字" * 90, "漢字" * 90]
)
@pytest.mark.parametrize("system", [[], [said("system", "Be short.")]])
def test_where_roles_must_alternate_the_last_user_message_itself_may_go_on(system: list[Any], end: str) -> None:
    renderer = Renderer(tokenizer("mistral"))
    messages = [*system, said("user", "What is in the house" + end)]
    with pytest.raises(InvalidRequest, match="alternate"):
        renderer.prompt(Context((*messages, said("user", "more"))))
    longer = [[*messages[:-1], said("user", messages[-1]["content"] + text)] for text in TEXTS]
    check_prefix(renderer, messages, [messages, *longer])


@pytest.mark.parametrize("last", [said("system", "Be short."), said("assistant", "It is warm")])
def test_where_roles_must_alternate_other_contexts_go_on_with_the_user(last: dict[str, Any]) -> None:
    messages = [last] if last["role"] == "system" else [said("user", "Hi"), last]
    check_prefix(Renderer(tokenizer("mistral")), messages, follow_ups(messages))


@pytest.mark.parametrize("name", ["mistral", "llama31", "qwen3"])
@pytest.mark.parametrize("lines", ["", "\n", "\n\n\n", " \n \n"])
def test_line_breaks_before_the_words_of_the_user_may_merge_with_theirs(name: str, lines: str) -> None:
    """Where the system message and the user's words lie in one text, nothing keeps them apart."""
    merging = copy(tokenizer(name))
    merging.chat_template = tokenizer("mistral").chat_template
    messages = [said("system", f"Be short{lines}")]
    check_prefix(Renderer(merging), messages, follow_ups(messages))


def test_token_ids_are_taken_as_they_are() -> None:
    context = Context(token_ids=(5, 3, 5))
    for renderer in (Renderer(None), Renderer(tokenizer("qwen3"))):
        assert renderer.prompt(context) == renderer.prefix(context) == [5, 3, 5]


WRONG = {
    "content missing": ("smollm2", ({"role": "user"},), {}),
    "content a number": ("smollm2", (said("user", 7),), {}),
    "not a mapping": ("smollm2", ("hello",), {}),
    "no role": ("qwen3", ({"content": "hello"},), {}),
    "role a number": ("qwen3", ({"role": 7, "content": "hello"},), {}),
    "two tool calls": ("llama31", (said("user", "Hi"), {**call(), "tool_calls": call()["tool_calls"] * 2}), {}),
    "tool call without a name": ("qwen3", (said("user", "Hi"), said("assistant", "", tool_calls=[{}])), {}),
    "roles do not alternate": ("mistral", (said("assistant", "Hi"), said("assistant", "Hi")), {}),
    "a tool of no kind": ("qwen3", (said("user", "Hi"),), {"tools": ("weather",)}),
    "a template's own argument": ("qwen3", (said("user", "Hi"),), {"chat_template_kwargs": {"tokenize": True}}),
}


@pytest.mark.parametrize("case", WRONG)
def test_messages_that_cannot_be_rendered_are_refused(case: str) -> None:
    name, messages, more = WRONG[case]
    renderer = Renderer(tokenizer(name))
    for render in (renderer.prompt, renderer.prefix):
        with pytest.raises(InvalidRequest):
            render(Context(messages, **more))


def test_a_model_without_a_chat_template_asks_for_token_ids() -> None:
    silent = PreTrainedTokenizerFast(tokenizer_object=tokenizer("qwen3").backend_tokenizer)
    for renderer in (Renderer(None), Renderer(silent)):
        with pytest.raises(InvalidRequest, match="token_ids"):
            renderer.prompt(Context((said("user", "Hi"),)))
        with pytest.raises(InvalidRequest, match="token_ids"):
            renderer.prefix(Context((said("user", "Hi"),)))


def test_a_context_brings_no_template_of_its_own() -> None:
    renderer = Renderer(tokenizer("smollm2"))
    context = Context(messages=({"role": "user", "content": "hi"},), chat_template_kwargs={"chat_template": "{{ 1 }}"})
    with pytest.raises(InvalidRequest, match="chat_template"):
        renderer.prompt(context)


def test_one_message_written_in_two_ways_is_one_prefix() -> None:
    renderer = Renderer(tokenizer("smollm2"))
    said = {"role": "system", "content": "Read the handbook."}
    in_parts = {"role": "system", "content": [{"type": "text", "text": "Read the handbook."}], "name": None}
    assert renderer.prefix(Context(messages=(said,))) == renderer.prefix(Context(messages=(in_parts,)))
