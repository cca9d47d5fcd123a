"""The embedded world: tasks are stable, disjoint and correct, and the base policy has room to learn."""

import importlib
import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from cropi_core.errors import ConfigError, DataError, PolicyError
from cropi_core.prompts import load_source
from cropi_core.world import FAMILIES, base_checkpoint, build, ladder_checkpoint
from cropi_core.world.families import DIGITS, LETTERS, LUCKY_ANSWERS, SIGNS, SPLITS, Draws, split_of
from cropi_core.world.noisy_rewards import wrong_5, wrong_10, wrong_20
from cropi_core.world.tokenizer import BOS_ID, EOS_ID, PAD_ID, UNK_ID, build_tokenizer
from cropi_core.world.train_base import BASE, LADDER, MAX_COMPLETION, MAX_LENGTH, main, sampled_accuracy
from data_schemas import WorldSource
from data_schemas.tables import PROMPTS

ALL = dict.fromkeys(FAMILIES, 60)

PINNED = {
    "rev:nycw=": "wcyn",
    "srt:bmznz=": "bmnzz",
    "shf:yuksdm=": "zvlten",
    "ddp:mkeem=": "mke",
    "cpy:lktyh=": "lktyh",
    "cpy:dcr=": "dcr",
    "add:687+656=": "1343",
    "nse:cmqx=": "xcgt",
    "lck:vnhb=": "4",
}


def texts(table: pa.Table) -> list[str]:
    return [messages[0]["content"] for messages in table.column("messages").to_pylist()]


def answers(table: pa.Table) -> dict[str, str]:
    return dict(zip(texts(table), table.column("answer").to_pylist(), strict=True))


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(base_checkpoint(), local_files_only=True)


@pytest.fixture(scope="module")
def policy():
    return AutoModelForCausalLM.from_pretrained(base_checkpoint(), local_files_only=True)


def test_same_call_gives_the_same_table():
    assert build(ALL, "pool", 3).equals(build(ALL, "pool", 3))
    assert texts(build(ALL, "pool", 3)) != texts(build(ALL, "pool", 4))


def test_tasks_never_change():
    """Tasks are stable: a changed draw would silently give another pool with the same name."""
    table = build(dict.fromkeys(FAMILIES, 1), "pool", 0)
    assert answers(table) == PINNED


def test_more_prompts_begin_with_fewer():
    few, many = build({"sort": 20}, "pool", 0), build({"sort": 50}, "pool", 0)
    assert many.slice(0, 20).equals(few)


@pytest.mark.parametrize("family", FAMILIES)
def test_splits_are_disjoint_whatever_the_seeds(family):
    found = {split: set() for split in SPLITS}
    for split, seed in itertools.product(SPLITS, range(3)):
        found[split].update(texts(build({family: 300}, split, seed)))
    for left, right in itertools.combinations(SPLITS, 2):
        assert not found[left] & found[right]


def test_copy_and_easy_share_a_prefix_and_no_text():
    table = build({"copy": 500, "easy": 500}, "pool", 0)
    assert len(set(texts(table))) == 1000


@given(st.text(max_size=20))
def test_every_text_belongs_to_one_split(text):
    assert split_of(text) in SPLITS


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(sorted(FAMILIES)), st.sampled_from(sorted(SPLITS)), st.integers(0, 2**31))
def test_ids_and_texts_are_unique_and_name_their_origin(family, split, seed):
    table = build({family: 50}, split, seed)
    ids = table.column("prompt_id").to_pylist()
    assert len(set(ids)) == len(set(texts(table))) == 50
    assert all(name.startswith(f"{family}-{split}-") for name in ids)


def test_schema_is_exact():
    table = build(ALL, "validation", 0)
    assert table.schema.equals(PROMPTS)
    families = [name for name, n in ALL.items() for _ in range(n)]
    assert table.column("source").to_pylist() == families
    assert table.column("tags").to_pylist() == [[FAMILIES[name].role] for name in families]
    assert set(table.column("verifier").to_pylist()) == {"exact"}
    assert build({}, "pool", 0).schema.equals(PROMPTS)


def right_answer(text: str) -> str | None:
    """Solve a task independently of its generator; None if the answer cannot be determined."""
    kind, body = text.removesuffix("=").split(":")
    if kind == "add":
        return str(sum(int(number) for number in body.split("+")))
    if kind == "ddp":
        return "".join(c for i, c in enumerate(body) if c not in body[:i])
    if kind == "shf":
        return "".join(chr((ord(c) - ord("a") + 1) % 26 + ord("a")) for c in body)
    if kind == "srt":
        return "".join(c * body.count(c) for c in LETTERS)
    if kind == "rev":
        return "".join(reversed(body))
    return body if kind == "cpy" else None


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_right(family):
    table = build({family: 500}, "test", 7)
    levels = table.column("level").to_pylist()
    for (text, answer), level in zip(answers(table).items(), levels, strict=True):
        assert level == (None if family == "add3" else str(len(text) - len("abc:=")))
        if family == "noise":
            assert len(answer) == 4
        elif family == "lucky":
            assert answer in LUCKY_ANSWERS
        else:
            assert answer == right_answer(text)


def test_noisy_answers_belong_to_the_text_and_not_to_the_seed():
    """If two seeds draw the same text, their answers must agree; otherwise pools would contradict one another."""

    class SameText(Draws):
        def word(self, shortest: int, longest: int) -> str:
            return "abcd" if shortest < longest else super().word(shortest, longest)

    for family in ("noise", "lucky"):
        tasks = {FAMILIES[family].draw(SameText(f"{seed}")) for seed in range(20)}
        assert len(tasks) == 1
    assert set(answers(build({"lucky": 40}, "pool", 0)).values()) == set(LUCKY_ANSWERS)


def test_half_of_dedup_has_something_to_drop():
    table = build({"dedup": 500}, "pool", 0)
    assert sum(len(text) - len("ddp:=") > len(answer) for text, answer in answers(table).items()) > 250


def test_errors_name_the_choices():
    with pytest.raises(ConfigError, match=r"unknown family 'anagram'; choose from .*dedup.*reverse-7"):
        build({"anagram": 3, "sort": 1}, "pool", 0)
    for name in ("add3-4", "reverse-0", "reverse-99", "reverse-", "reverse-x", "-4", "reverse--4"):
        with pytest.raises(ConfigError, match=f"unknown family '{name}'"):
            build({name: 1}, "pool", 0)
    with pytest.raises(ConfigError, match=r"'train'; choose from pool, validation, test, warmup"):
        build({"sort": 1}, "train", 0)
    with pytest.raises(ConfigError, match="sort: -1"):
        build({"sort": -1}, "pool", 0)


def test_a_family_with_a_number_has_words_of_that_length():
    counts = {"reverse": 200, "reverse-5": 200, "reverse-9": 20, "dedup-8": 20, "copy-2": 20}
    table = build(counts, "pool", 0)
    assert len(set(texts(table))) == sum(counts.values())
    assert table.slice(0, 200).equals(build({"reverse": 200}, "pool", 0))
    sources, levels = table.column("source").to_pylist(), table.column("level").to_pylist()
    for name in counts:
        lengths = {level for source, level in zip(sources, levels, strict=True) if source == name}
        assert lengths == ({"4", "5", "6"} if name == "reverse" else {name.partition("-")[2]})
    assert all(answer == right_answer(text) for text, answer in answers(table).items())


def test_an_exhausted_family_says_how_much_it_has():
    with pytest.raises(DataError, match=r"'easy' has only 2,\d{3} distinct tasks .* 9,000 were requested"):
        build({"easy": 9_000}, "validation", 0)


def test_tokenizer_reads_every_task_back(tokenizer):
    table = build(ALL, "pool", 0)
    for text in [*texts(table), *table.column("answer").to_pylist()]:
        ids = tokenizer.encode(text)
        assert ids[0] == BOS_ID
        assert len(ids) == len(text) + 1
        assert UNK_ID not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_chat_template_gives_the_ids_of_the_text_with_bos(tokenizer):
    for text in texts(build(ALL, "pool", 1)):
        messages = [{"role": "user", "content": text}]
        for add_generation_prompt in (False, True):
            rendered = tokenizer.apply_chat_template(
                messages, add_generation_prompt=add_generation_prompt, return_dict=False
            )
            assert rendered == tokenizer.encode(text)
    answered = [{"role": "user", "content": "rev:ab="}, {"role": "assistant", "content": "ba"}]
    assert tokenizer.apply_chat_template(answered, return_dict=False)[-1] == EOS_ID


def test_tokenizer_survives_saving(tmp_path, tokenizer):
    """AutoTokenizer rebuilds some tokenizers by model type; a rebuilt Llama tokenizer would split text differently."""
    tokenizer.save_pretrained(tmp_path)
    for other in (AutoTokenizer.from_pretrained(tmp_path), build_tokenizer(MAX_LENGTH)):
        sample = DIGITS + LETTERS + SIGNS
        assert other.encode(sample) == tokenizer.encode(sample)
        assert (other.pad_token_id, other.bos_token_id, other.eos_token_id) == (PAD_ID, BOS_ID, EOS_ID)
        assert other.encode(" B\n", add_special_tokens=False) == [UNK_ID] * 3


def test_checkpoint_is_small_and_loads_in_float32(policy, tokenizer):
    assert sum(path.stat().st_size for path in base_checkpoint().iterdir()) < 4e6
    assert policy.dtype == torch.float32
    assert policy.config.vocab_size == len(tokenizer)
    assert policy.generation_config.eos_token_id == EOS_ID != policy.generation_config.pad_token_id == PAD_ID


def test_a_missing_checkpoint_says_how_to_get_it(monkeypatch, tmp_path):
    world = importlib.import_module("cropi_core.world.base_policy")
    monkeypatch.setattr(world, "__file__", str(tmp_path / "base_policy.py"))
    with pytest.raises(PolicyError, match=r"python -m cropi_core\.world\.train_base"):
        base_checkpoint()


# Wider than the sampling error of 150 tasks (4 points): the test is to detect a solved or a lost family.
BANDS = {
    "learnable": (0.2, 0.65),
    "solved": (0.85, 1.0),
    "hopeless": (0.0, 0.03),
    "noise": (0.0, 0.01),
    "lucky": (0.12, 0.38),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_base_has_headroom(family, policy, tokenizer):
    low, high = BANDS.get(family) or BANDS[FAMILIES[family].role]
    assert low <= sampled_accuracy(policy, tokenizer, family, n=150, seed=0) <= high


def test_the_ladder_falls_with_the_length_of_the_word():
    policy = AutoModelForCausalLM.from_pretrained(ladder_checkpoint(), local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(ladder_checkpoint(), local_files_only=True)
    accuracies = [
        sampled_accuracy(policy, tokenizer, name, 100, 0, LADDER.max_completion) for name in LADDER.families
    ]
    assert min(accuracies[:3]) > 0.75  # 3 to 5 letters
    assert all(longer < shorter - 0.1 for shorter, longer in itertools.pairwise(accuracies[2:6]))
    assert accuracies[6] < 0.05  # the base cannot do 9 letters


def test_base_ends_its_answers(policy, tokenizer):
    """A completion without eos would be truncated, and GRPO would learn lengths instead of tasks."""
    table = build(ALL, "test", 2)
    inputs = tokenizer(texts(table), return_tensors="pt", padding=True)
    torch.manual_seed(0)
    ids = policy.generate(**inputs, do_sample=True, top_k=0, max_new_tokens=MAX_COMPLETION)
    ended = (ids[:, inputs["input_ids"].shape[1] :] == EOS_ID).any(dim=1)
    assert ended.float().mean() > 0.97


def test_noisy_rewards_are_wrong_on_their_share_and_always_the_same():
    words = [Draws(str(i)).word(4, 6) for i in range(4000)]
    for function, share in ((wrong_5, 0.05), (wrong_10, 0.1), (wrong_20, 0.2)):
        first, again = ([function(word, "abcdefg") for word in words] for _ in range(2))
        assert np.mean(first) == pytest.approx(share, abs=0.02)
        assert first == again
        assert np.mean([function(word, word) for word in words]) == pytest.approx(1 - share, abs=0.02)


def test_a_pool_can_have_another_verifier():
    source = WorldSource(families={"copy": 3}, verifier="noisy")
    assert load_source(source, "pool", None)[0]["verifier"].to_pylist() == ["noisy"] * 3
    assert "verifier" not in WorldSource(families={"copy": 3}).for_key()


def test_training_script_writes_a_loadable_checkpoint(monkeypatch, tmp_path: Path, capsys):
    monkeypatch.setattr("sys.argv", ["train_base", "--out", str(tmp_path), "--steps", "1"])
    monkeypatch.setattr("cropi_core.world.train_base.BASE", replace(BASE, families=("copy",)))
    main()
    assert "copy" in capsys.readouterr().out
    assert AutoModelForCausalLM.from_pretrained(tmp_path).num_parameters() == 864_384
