"""Draws against the model's own distribution; what an image may and may not depend on."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from crt.ar.generator import DrawSettings, Generator, distribution, draw, guidance_scales, image_uniforms
from crt.errors import UserError
from tests.ar.conftest import CODEBOOK, small_model

LABELS = [0, 1, 2, 3, 4, 0, 1]


@pytest.fixture(scope="module")
def generator() -> Generator:
    return Generator(small_model(scale=2.0))


def test_codes_are_those_of_uncached_decoding(generator: Generator) -> None:
    """Oracle: at every position the whole sequence anew, guidance as two separate passes, a plain inversion."""
    guidance = 2.5
    codes = generator.generate(LABELS, guidance=guidance, seed=3, first_index=11)
    uniforms = image_uniforms(3, range(11, 11 + len(LABELS)), 16)
    labels = torch.tensor(LABELS)
    drawn = torch.zeros_like(codes)
    for position in range(16):
        conditional = generator.model.logits(drawn, labels)[:, position]
        unconditional = generator.model.logits(drawn, torch.full_like(labels, 5))[:, position]
        probabilities = (unconditional + guidance * (conditional - unconditional)).softmax(-1)
        for row in range(len(LABELS)):
            cumulative = np.cumsum(probabilities[row].double().numpy())
            drawn[row, position] = int(np.argmax(cumulative > uniforms[row, position].item() * cumulative[-1]))
    assert torch.equal(codes, drawn)


def test_guidance_of_one_is_no_guidance(generator: Generator) -> None:
    """Oracle: the codes are likely under the conditional model alone, and the null class is not even read."""
    blind = small_model(scale=2.0)
    with torch.no_grad():
        blind.class_embedding.weight[5] = torch.nan
    assert torch.equal(Generator(blind).generate(LABELS), generator.generate(LABELS, guidance=1.0))
    near = generator.generate(LABELS, guidance=1.0 + 1e-9)
    assert torch.equal(near, generator.generate(LABELS, guidance=1.0))


def test_an_image_depends_on_seed_and_index_alone(generator: Generator) -> None:
    whole = generator.generate(LABELS, guidance=2.0, seed=1)
    assert torch.equal(generator.generate(LABELS, guidance=2.0, seed=1, batch_size=3), whole)
    for index, label in enumerate(LABELS):
        assert torch.equal(generator.generate([label], guidance=2.0, seed=1, first_index=index)[0], whole[index])
    assert not torch.equal(generator.generate(LABELS, guidance=2.0, seed=2), whole)
    assert len({tuple(row) for row in generator.generate([0] * 8).tolist()}) == 8


def test_all_batches_of_a_call_have_one_size(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU products round differently at another size, and a graph is recorded for each."""
    sizes = []
    generate = Generator._generate_batch

    def note_size(self: Generator, labels: torch.Tensor, *rest: Any) -> torch.Tensor:
        sizes.append(len(labels))
        return generate(self, labels, *rest)

    monkeypatch.setattr(Generator, "_generate_batch", note_size)
    assert len(generator.generate(LABELS, batch_size=3)) == 7
    assert sizes == [3, 3, 3]


def test_guidance_scales_are_those_of_the_schedules() -> None:
    def scales(schedule: str, interval: tuple[float, float] = (0.0, 1.0)) -> list[float]:
        return guidance_scales(DrawSettings(3.0, 1.0, 0, 1.0, schedule, interval), 5).tolist()

    assert scales("constant") == [3, 3, 3, 3, 3]
    assert scales("linear") == [1, 1.5, 2, 2.5, 3]
    assert scales("cosine") == pytest.approx([1, 2 - 2**0.5 / 2, 2, 2 + 2**0.5 / 2, 3])
    assert scales("constant", (0.2, 0.6)) == [1, 3, 3, 1, 1]
    assert scales("constant", (0.5, 0.5)) == [1, 1, 1, 1, 1]


def test_outside_the_interval_there_is_no_guidance(generator: Generator) -> None:
    """Oracles: the unguided draw, as long as nothing was guided; and the uncached definition where it is."""
    plain = generator.generate(LABELS, seed=6)
    guided = generator.generate(LABELS, guidance=3.0, seed=6, guidance_interval=(0.5, 1.0))
    assert torch.equal(guided[:, :8], plain[:, :8])
    assert not torch.equal(guided[:, 8:], plain[:, 8:])
    assert torch.equal(generator.generate(LABELS, guidance=3.0, seed=6, guidance_interval=(0.3, 0.3)), plain)


@pytest.mark.parametrize(
    ("guidance", "temperature", "top_k", "top_p"),
    [(1.0, 1.0, 0, 1.0), (1.0, 0.7, 5, 1.0), (1.0, 1.3, 0, 0.6), (2.0, 1.0, 12, 0.8)],
)
def test_draws_follow_the_distribution(
    generator: Generator, guidance: float, temperature: float, top_k: int, top_p: float
) -> None:
    """Chi-square of the first code of 4,000 images of a class against the definition of top-k and top-p."""
    count, label = 4000, 2
    codes = generator.generate(
        [label] * count, guidance=guidance, seed=5, temperature=temperature, top_k=top_k, top_p=top_p
    )
    none = torch.zeros(1, 16, dtype=torch.int64)
    conditional = generator.model.logits(none, torch.tensor([label]))[0, 0].double().numpy()
    unconditional = generator.model.logits(none, torch.tensor([5]))[0, 0].double().numpy()
    logits = (unconditional + guidance * (conditional - unconditional)) / temperature
    order = np.argsort(-logits)
    kept = order[: top_k or CODEBOOK]
    probabilities = np.exp(logits[kept]) / np.exp(logits[kept]).sum()
    nucleus = int(np.argmax(np.cumsum(probabilities) >= top_p - 1e-12)) + 1
    kept, probabilities = kept[:nucleus], probabilities[:nucleus] / probabilities[:nucleus].sum()
    observed = np.bincount(codes[:, 0].numpy(), minlength=CODEBOOK)
    assert observed.sum() == observed[kept].sum()  # nothing outside
    assert 1 < len(kept) < CODEBOOK or (top_k, top_p) == (0, 1.0)
    assert stats.chisquare(observed[kept], count * probabilities).pvalue > 1e-3


def test_draw_inverts_the_cumulative_distribution() -> None:
    probabilities = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]])
    uniforms = torch.tensor([0.0, 0.2499, 0.25, 0.7499, 0.75, 1 - 2.0**-53], dtype=torch.float64)
    codes = draw(probabilities.expand(6, 6), uniforms)
    assert codes.tolist() == [1, 1, 3, 3, 4, 4]
    # Sums that are not exactly 1 in float32, at the very end of the range.
    rough = torch.full((1, 30_000), 1 / 30_000)
    assert draw(rough, torch.tensor([1 - 2.0**-53], dtype=torch.float64)).item() == 29_999


def test_equal_logits_at_the_edge_of_top_k_are_all_kept() -> None:
    kept = distribution(torch.tensor([[3.0, 1.0, 1.0, 0.0]]), temperature=1.0, top_k=2, top_p=1.0)[0] > 0
    assert kept.tolist() == [True, True, True, False]


def test_the_likeliest_code_stays_for_any_top_p() -> None:
    kept = distribution(torch.tensor([[1.0, 3.0, 2.0]]), temperature=1.0, top_k=0, top_p=5e-324)[0] > 0
    assert kept.tolist() == [False, True, False]


def test_codes_that_reach_top_p_exactly_are_enough() -> None:
    kept = distribution(torch.zeros(1, 4), temperature=1.0, top_k=0, top_p=0.5)[0] > 0
    assert kept.tolist() == [True, True, False, False]


def test_uniforms_are_uniform_and_never_shared() -> None:
    uniforms = image_uniforms(0, range(2000), 8).flatten()
    assert stats.kstest(uniforms.numpy(), "uniform").pvalue > 1e-3
    assert len(uniforms.unique()) == len(uniforms)
    assert torch.equal(image_uniforms(0, [7], 8)[0], image_uniforms(0, range(5, 9), 8)[2])
    # The image's own numbers do not depend on how many codes follow.
    assert torch.equal(image_uniforms(0, [7], 4)[0], image_uniforms(0, [7], 8)[0, :4])


def test_bf16_draws_from_nearly_the_same_distribution() -> None:
    model = small_model(scale=1.0)
    exact = Generator(model).generate([1] * 64, seed=9)
    rounded = Generator(small_model(scale=1.0).to(torch.bfloat16)).generate([1] * 64, seed=9)
    assert (exact[:, 0] == rounded[:, 0]).float().mean() > 0.9


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"labels": [5]}, "label 5"),
        ({"labels": [-1]}, "label -1"),
        ({"labels": ["3"]}, r"labels \['3'\]: must be integers"),
        ({"labels": "3"}, "labels '3': must be integers"),
        ({"labels": None}, "labels None: must be integers"),
        ({"labels": [1.5]}, r"labels \[1.5\]: must be integers"),
        ({"labels": torch.ones(2)}, r"labels tensor\(\[1., 1.\]\): must be integers"),
        ({"labels": np.ones((40, 40))}, r"labels array\(.*\): must be integers"),
        ({"labels": [True]}, r"labels \[True\]: must be integers"),
        ({"labels": [10**30]}, "must be integers"),
        ({"labels": [[1, 2]]}, r"labels of shape \(1, 2\): must be one class per image"),
        ({"labels": [[1], [2, 3]]}, r"labels \[\[1\], \[2, 3\]\]"),
        ({"labels": 3}, r"labels of shape \(\): must be one class per image, such as \[3, 7\]"),
        ({"seed": "a"}, "seed 'a': must be an integer"),
        ({"seed": 1.5}, "seed 1.5: must be an integer"),
        ({"seed": None}, "seed None: must be an integer"),
        ({"seed": -1}, "seed -1: must be 0 or more"),
        ({"first_index": -1}, "first_index -1: must be 0 or more"),
        ({"guidance": "2"}, "guidance '2': must be a number"),
        ({"guidance": None}, "guidance None: must be a number"),
        ({"guidance": float("nan")}, "guidance nan: must be 1"),
        ({"guidance": float("inf")}, "guidance inf: must be 1"),
        ({"guidance": -1}, "guidance -1.0: must be 1"),
        ({"temperature": "x"}, "temperature 'x': must be a number"),
        ({"temperature": float("inf")}, "temperature inf: must be finite"),
        ({"temperature": 1e-40}, "temperature 1e-40: must be finite, 1e-06"),
        ({"top_k": -1}, "top_k -1: must be 0"),
        ({"top_k": 2.5}, "top_k 2.5: must be an integer"),
        ({"top_p": 2}, "top_p 2.0: must be greater than 0 and at most 1"),
        ({"top_p": "a"}, "top_p 'a': must be a number"),
        ({"batch_size": 1.5}, "batch_size 1.5: must be an integer"),
        ({"guidance_interval": (0.1,)}, r"guidance_interval \(0.1,\): must be two shares"),
        ({"guidance_interval": 0.5}, "guidance_interval 0.5: must be two shares"),
        ({"guidance_interval": (0.2, "b")}, "guidance_interval 'b': must be a number"),
        ({"guidance_schedule": ["sine"]}, r"guidance schedule \['sine'\]: use one of"),
        ({"guidance": 0.5}, "guidance 0.5"),
        ({"temperature": 0.0}, "temperature 0"),
        ({"top_k": 33}, "top_k 33"),
        ({"top_p": 0.0}, "top_p 0"),
        ({"guidance_schedule": "sine"}, "guidance schedule 'sine': use one of constant, linear, cosine"),
        ({"guidance_interval": (0.6, 0.5)}, "guidance interval"),
        ({"batch_size": 0}, "batch_size 0: must be 1 or more"),
        ({"batch_size": -1}, "batch_size -1"),
    ],
)
def test_impossible_requests_are_refused(generator: Generator, settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        generator.generate(**{"labels": [0]} | settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "labels",
    [
        (1, 2), range(1, 3), np.array([1, 2], np.uint8), np.array([1, 2], np.uint64), [np.int32(1), np.int64(2)],
        torch.tensor([1, 2], dtype=torch.int16), torch.tensor([1, 2], dtype=torch.uint16), list(torch.tensor([1, 2])),
        np.array([2, 1])[::-1], np.array([1, 2], ">i4"), np.frombuffer(bytes([1, 2]), np.uint8),
    ],
)  # fmt: skip
def test_integers_of_any_type_are_labels(generator: Generator, labels: Any) -> None:
    assert torch.equal(generator.generate(labels), generator.generate([1, 2]))


def test_numbers_of_any_type_are_settings(generator: Generator) -> None:
    expected = generator.generate([1, 2], guidance=2.0, seed=3, temperature=0.5, top_k=4, batch_size=2)
    for integer in (np.int64, np.uint8, torch.tensor):
        for number in (np.float32, np.float64, torch.tensor):
            codes = generator.generate(
                [1, 2], number(2), integer(3), temperature=number(0.5), top_k=integer(4), batch_size=integer(2)
            )
            assert torch.equal(codes, expected)


def test_no_labels_make_no_images(generator: Generator) -> None:
    for none in ([], np.array([], np.int64), torch.tensor([])):
        codes = generator.generate(none)
        assert codes.shape == (0, 16) and codes.dtype == torch.int64


def test_the_smallest_temperature_draws_the_likeliest_code_at_the_largest_guidance(generator: Generator) -> None:
    codes = generator.generate([1] * 8, guidance=1e6, temperature=1e-6)
    assert len(codes.unique(dim=0)) == 1


def test_changed_weights_count_at_the_next_call() -> None:
    """Oracle: a generator made after the change. `.data` is what fused optimizers and averages write to."""
    model = small_model(scale=2.0)
    generator = Generator(model)
    for change in (
        model.head.weight.data.neg_,
        lambda: model.load_state_dict(small_model(seed=1, scale=2.0).state_dict(), assign=True),
        lambda: model.to(torch.bfloat16),
    ):
        before = generator.generate(LABELS, 2.0)
        change()
        after = generator.generate(LABELS, 2.0)
        assert torch.equal(after, Generator(model).generate(LABELS, 2.0))
        assert not torch.equal(after, before)


def test_the_modes_around_a_call_change_nothing() -> None:
    """Nor does one that was made in inference mode keep the next from running, or the model from training."""
    expected = Generator(small_model(scale=2.0)).generate(LABELS, 2.0)
    generator = Generator(small_model(scale=2.0))
    for mode in (torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.no_grad(), torch.enable_grad()):
        with mode:
            codes = generator.generate(torch.tensor(LABELS), 2.0)
        assert torch.equal(codes, expected) and not codes.is_inference()
    for calls in ("generate", "model"):
        model = small_model(scale=2.0)
        with torch.inference_mode():
            if calls == "generate":
                Generator(model).generate(LABELS)
            else:
                model(expected, torch.tensor(LABELS))
        model.requires_grad_(True)
        model(expected, torch.tensor(LABELS)).mean().backward()
        assert model.head.weight.grad is not None


def test_a_generator_is_copied_and_pickled_with_its_model(generator: Generator) -> None:
    expected = generator.generate(LABELS, 2.0)
    twin = copy.deepcopy(generator)
    for other in (twin, pickle.loads(pickle.dumps(generator))):
        assert torch.equal(other.generate(LABELS, 2.0), expected)
    with torch.no_grad():
        twin.model.head.weight.neg_()
    assert torch.equal(generator.generate(LABELS, 2.0), expected)
    assert not torch.equal(twin.generate(LABELS, 2.0), expected)


def test_threads_may_draw_at_once(generator: Generator) -> None:
    expected = [generator.generate(LABELS, 2.0, seed=seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as threads:
        drawn = list(threads.map(lambda turn: generator.generate(LABELS, 2.0, seed=turn % 4), range(16)))
    assert all(torch.equal(codes, expected[turn % 4]) for turn, codes in enumerate(drawn))
