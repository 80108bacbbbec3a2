"""Play the story against one worker, and measure each answer."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from kvprefetch.demo.story import Ask, Open, Step, opening
from kvprefetch.inprocess import Local

SESSION = "developer"
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Answer:
    """One measured answer."""

    kind: str
    file: str
    context_tokens: int  # prompt tokens, the question included
    ttft_s: float
    reused_tokens: int
    tokens: list[int]
    text: str


@dataclass
class Player:
    """A developer at work. `preload`: signals are sent and pauses take real time; without, nothing happens
    in a pause, so none is waited for. `forget`: the pool is emptied before every question.
    """

    kv: Local
    texts: dict[str, str]
    preload: bool
    forget: bool
    max_tokens: int
    tell: Tell
    chats: dict[str, list[dict[str, str]]] = field(default_factory=dict)

    def play(self, story: tuple[Step, ...]) -> list[Answer]:
        """All answers of the story, in order."""
        answers = []
        for step in story:
            if isinstance(step, Open):
                self._open(step)
            else:
                answers.append(self._ask(step))
        return answers

    def resident(self, story: tuple[Step, ...]) -> list[float]:
        """TTFT of another question to each conversation as it stands now: everything before it is resident."""
        asks = [step for step in story if isinstance(step, Ask)]
        times = []
        for step in asks:
            self.tell(f"{step.file}: once more, all of it resident")
            question = {"role": "user", "content": step.question.upper()}
            done = self.kv.generate([*self.chats[step.file], question], max_tokens=1).result()
            assert done.ttft_s is not None
            times.append(done.ttft_s)
        return times

    def _open(self, step: Open) -> None:
        self.chats[step.file] = opening(self.texts[step.file])
        self.tell(f"{step.file}: opened" + (", being read" if self.preload else ""))
        if self.preload:
            context = self.kv.context(self.chats[step.file])
            self.kv.signal("document_opened", session=SESSION, contexts=[context])
            time.sleep(step.read_s)

    def _ask(self, step: Ask) -> Answer:
        if self.preload:
            time.sleep(step.pause_s)
        if self.forget:
            self.kv.clear()
        self.tell(f"{step.file}: {step.question}")
        chat = self.chats[step.file]
        chat.append({"role": "user", "content": step.question})
        done = self.kv.generate(chat, session=SESSION, max_tokens=self.max_tokens).result()
        chat.append({"role": "assistant", "content": done.text})
        assert done.ttft_s is not None
        return Answer(step.kind, step.file, done.prompt_tokens, done.ttft_s, done.reused_tokens, done.tokens, done.text)
