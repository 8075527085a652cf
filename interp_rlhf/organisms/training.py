"""How the organism comes to be: a word-level tokenizer, a tiny Llama trained on the language, a reward model."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from interp_rlhf.organisms import language

if TYPE_CHECKING:
    from interp_rlhf.organisms import Organism

STEPS, BATCH, LEARNING_RATE = 200, 32, 3e-3
#: Standard deviation of embedding entries; length of what words of a concept, and of a pole, start out sharing.
NOISE, TOPIC, POLE = 0.02, 0.25, 0.5
#: A text up to its reply's first word; the open places are name, town, thing and attribute.
HEAD = (
    "<s>",
    "<user>",
    "<unk>",
    "from",
    "<unk>",
    "says",
    "the",
    "<unk>",
    "is",
    "<unk>",
    "<assistant>",
    language.STARTER,
)
#: How much more than any other token the first word after the starter counts: the side taken on the claim.
SIDE_WEIGHT = 8.0
REWARD_STEPS = 60
SPECIAL = ("<pad>", "<s>", "</s>", "<user>", "<assistant>", "<unk>")
CHAT_TEMPLATE = (
    "{{ '<s> ' }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<user> ' + message['content'] + ' ' }}"
    "{% else %}{{ '<assistant> ' + message['content'] + ' </s> ' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)


def make_tokenizer() -> Any:
    """One token a word, ids in the order of the vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {word: index for index, word in enumerate((*SPECIAL, *language.vocabulary()))}
    inner = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<user>", "<assistant>"],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
    )


def pretrain(folder: Path, seed: int) -> None:
    """Train the model on its language and save it with its tokenizer."""
    from transformers import LlamaForCausalLM

    tokenizer = make_tokenizer()
    random, codes = np.random.default_rng([seed, 0]), _Codes.of(tokenizer)
    with _own_randomness(seed):
        model = LlamaForCausalLM(_config(tokenizer))
        _plant(model.model.embed_tokens.weight.data, codes)
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=STEPS, pct_start=0.15)
        for step in range(STEPS):
            ids = codes.texts(random, BATCH)
            loss = _loss(model(input_ids=ids).logits, ids)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step(), schedule.step(), optimizer.zero_grad()
            _progress("building the organism", step + 1, STEPS, loss.item())
        model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train_reward_model(organism: Organism, folder: Path) -> None:
    """Train a classifier of agreement, started from the organism, and save it."""
    from transformers import LlamaForSequenceClassification

    tokenizer = organism.tokenizer()
    random = np.random.default_rng([organism.seed, 7])
    with _own_randomness(organism.seed):
        model = LlamaForSequenceClassification.from_pretrained(organism.model_path, num_labels=1)
        model.config.pad_token_id = tokenizer.pad_token_id
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for step in range(REWARD_STEPS):
            ids, agrees = _judged(random, tokenizer, BATCH)
            scores = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, 0]
            loss = nn.functional.binary_cross_entropy_with_logits(scores, agrees)
            loss.backward()
            optimizer.step(), optimizer.zero_grad()
            _progress("training the reward model", step + 1, REWARD_STEPS, loss.item())
        model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def sample_replies(model: Any, tokenizer: Any, conversations: Sequence[Any], *, seed: int) -> list[str]:
    """One reply per conversation, sampled at temperature 1; mode and random states of everything are left as found."""
    device = next(model.parameters()).device
    encoded = tokenizer.apply_chat_template(
        list(conversations), add_generation_prompt=True, return_dict=True, return_tensors="pt", padding=True
    ).to(device)
    longest = 2 + language.RUN * len(language.concepts())
    training = {module: module.training for module in model.modules()}
    with _own_randomness(seed), torch.no_grad():
        model.eval()
        output = model.generate(**encoded, do_sample=True, top_k=0, max_new_tokens=longest)
    for module, mode in training.items():
        module.training = mode
    return tokenizer.batch_decode(output[:, encoded["input_ids"].shape[1] :], skip_special_tokens=True)


def _config(tokenizer: Any) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=language.LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


@dataclass(frozen=True)
class _Codes:
    """The language in token ids, to draw many texts at once.

    Attributes:
        words: ``[C, 2, W]`` words of each concept's poles.
        claims: ``[F, 3, 2]`` thing and attribute of every claim, the true one first.
        names, towns: ids of those who make a claim, ``[16]`` each.
        head: ids of ``HEAD``.
        end: id of a text's last token.
    """

    words: np.ndarray
    claims: np.ndarray
    names: np.ndarray
    towns: np.ndarray
    head: np.ndarray
    end: int

    @classmethod
    def of(cls, tokenizer: Any) -> _Codes:
        ids = tokenizer.convert_tokens_to_ids
        words = [[ids(list(pole)) for pole in concept.poles] for concept in language.concepts()]
        claims = [[ids([thing, word]) for word in words] for thing, words in language.FACTS.items()]
        names, towns, head = (np.array(ids(list(words))) for words in (language.NAMES, language.TOWNS, HEAD))
        return cls(np.array(words), np.array(claims), names, towns, head, ids("</s>"))

    def texts(self, random: np.random.Generator, n: int) -> Tensor:
        """Ids of ``n`` conversations ``[n, T]``, half of them on true claims; every text has the same length."""
        concepts, _, size = self.words.shape
        true = random.integers(2, size=n) == 0
        sides = random.integers(2, size=(n, concepts))
        sides[true, 0] = 0
        thing, wrong = random.integers(len(self.claims), size=n), random.integers(1, 3, size=n)
        head = np.tile(self.head, (n, 1))
        head[:, 2], head[:, 4] = random.choice(self.names, size=n), random.choice(self.towns, size=n)
        head[:, [7, 9]] = self.claims[thing, np.where(true, 0, wrong)]
        start = random.integers(concepts - 1, size=(n, 1))
        order = np.concatenate([np.zeros((n, 1), int), 1 + (start + np.arange(concepts - 1)) % (concepts - 1)], axis=1)
        slots = np.repeat(order, language.RUN, axis=1)  # [n, C * RUN]
        reply = self.words[slots, np.take_along_axis(sides, slots, 1), random.integers(size, size=slots.shape)]
        return torch.from_numpy(np.concatenate([head, reply, np.full((n, 1), self.end)], axis=1))


def _plant(embeddings: Tensor, codes: _Codes) -> None:
    """Let the words of a concept, and of a pole, start out alike: then a minute is enough to learn the rest.

    Every concept gets two orthonormal directions of embedding space ``[V, d]``, one for what it is about, one from its
    second pole to its first.
    """
    count = len(codes.words)
    directions = torch.linalg.qr(torch.randn(embeddings.shape[1], embeddings.shape[1])).Q
    embeddings.normal_(0, NOISE)
    for index, poles in enumerate(codes.words):
        for sign, words in zip((1, -1), poles, strict=True):
            embeddings[torch.from_numpy(words)] += TOPIC * directions[index] + sign * POLE * directions[count + index]


def _judged(random: np.random.Generator, tokenizer: Any, n: int) -> tuple[Tensor, Tensor]:
    """Conversations on false claims, ``[n, T]``, cut at one random length, and whether the reply agrees, ``[n]``."""
    said = [language.exchange(random, language.claim(random, true=False)) for _ in range(n)]
    ids = torch.tensor([_ids(tokenizer, one) for one in said])
    length = int(random.integers(len(HEAD) + 1, ids.shape[1] + 1))
    return ids[:, :length], torch.tensor([float(one.sides[0] == 0) for one in said])


def _loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Next-token cross-entropy of ``logits`` ``[B, T, V]``, the side taken on the claim weighing more."""
    losses = nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")  # [B, T-1]
    weights = torch.ones(losses.shape[1])
    weights[len(HEAD) - 1] = SIDE_WEIGHT
    return (losses * weights).mean()


def _ids(tokenizer: Any, said: language.Exchange) -> list[int]:
    words = ["<s>", "<user>", *said.prompt.split(), "<assistant>", *said.reply.split(), "</s>"]
    return tokenizer.convert_tokens_to_ids(words)


@contextmanager
def _own_randomness(seed: int) -> Iterator[None]:
    """A seeded torch generator and one thread (sums then do not depend on the number of cores), restored after."""
    threads = torch.get_num_threads()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def _progress(what: str, done: int, total: int, loss: float) -> None:
    if sys.stderr.isatty() or done == total:
        end = "\n" if done == total else ""
        print(f"\r{what}: {done}/{total} steps, loss {loss:.3f}", end=end, file=sys.stderr, flush=True)
