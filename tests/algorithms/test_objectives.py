# SPDX-License-Identifier: Apache-2.0
"""PPO's mathematics against hand-worked numbers, loops from the papers' formulas, and TRL 1.12."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, special, stats

from lora_rlhf.algorithms import objectives as o

NAN = float("nan")
GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "ppo.json").read_text(encoding="utf-8"))


def t(*rows):
    return torch.tensor(rows, dtype=torch.float32)


def mask_of(lengths, width):
    return (torch.arange(width).expand(len(lengths), -1) < torch.tensor(lengths)[:, None]).long()


class Batch:
    """A random batch; padding holds NaN."""

    def __init__(self, lengths, seed, extra=0):
        width = max(lengths) + extra
        self.lengths, self.mask = lengths, mask_of(lengths, width)
        rng = np.random.default_rng(seed)
        rows = [rng.normal(size=(6, n)).astype(np.float32) for n in lengths]
        names = ("logprobs", "old", "reference", "values", "old_values", "returns")
        for k, name in enumerate(names):
            x = torch.full((len(lengths), width), NAN)
            for i, n in enumerate(lengths):
                x[i, :n] = torch.from_numpy(rows[i][k])
            setattr(self, name, x)
        self.advantages = self.returns.clone()
        self.scores = torch.from_numpy(rng.normal(size=len(lengths)).astype(np.float32))


batches = st.builds(
    Batch, st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(0, 10**6)
)
quick = settings(max_examples=25, deadline=None, derandomize=True)


# ------------------------------------------------------------------------ by hand


def test_masked_mean_is_over_tokens_not_over_episodes():
    """(1 + 1 + 1 + 5) / 4 = 2; a mean of means would be (1 + 5) / 2 = 3."""
    assert o.masked_mean(t([1, 1, 1], [5, NAN, NAN]), mask_of([3, 1], 3)) == 2
    assert o.masked_sum(t([1, 1, 1], [5, NAN, NAN]), mask_of([3, 1], 3)) == 8
    assert o.masked_mean(t([NAN]), mask_of([0], 1)) == 0


def test_whiten_by_hand():
    """[1, 3] has mean 2 and (biased) standard deviation 1; without the shift 2 comes back."""
    x, mask = t([1, 3, NAN]), mask_of([2], 3)
    assert torch.allclose(o.whiten(x, mask), t([-1, 1, 0]))
    assert torch.allclose(o.whiten(x, mask, shift_mean=False), t([1, 3, 0]))


def test_whiten_of_equal_values_is_zero():
    assert torch.equal(o.whiten(t([4, 4]), mask_of([2], 2)), t([0, 0]))
    assert torch.equal(o.whiten(t([4, NAN]), mask_of([1], 2)), t([0, 0]))


def test_kl_by_hand():
    """log ratio ln 2: k1 = ln 2, k2 = (ln 2)² / 2, k3 = 1/2 - 1 + ln 2."""
    kl = o.kl_estimates(t([math.log(0.5), 9]), t([math.log(0.25), NAN]), mask_of([1], 2))
    assert torch.allclose(kl.k1, t([0.693147, 0]))
    assert torch.allclose(kl.k2, t([0.240227, 0]))
    assert torch.allclose(kl.k3, t([0.193147, 0]))


def test_kl_stays_finite_where_the_reference_excludes_a_token():
    kl = o.kl_estimates(t([-700.0, -0.1]), t([-0.1, -700.0]), mask_of([2], 2))
    assert all(torch.isfinite(k).all() for k in kl)


def test_token_rewards_by_hand():
    """beta 0.1: -0.1 KL at each token; the score on top of it at the last valid one only."""
    kl = t([1, 2, NAN, NAN], [3, 4, 5, 6], [NAN, NAN, NAN, NAN])
    found = o.token_rewards(torch.tensor([10.0, 20.0, 30.0]), kl, mask_of([2, 4, 0], 4), 0.1)
    expected = t([-0.1, 9.8, 0, 0], [-0.3, -0.4, -0.5, 19.4], [0, 0, 0, 0])
    assert torch.allclose(found, expected)


def test_gae_by_hand():
    """Three tokens, gamma 0.5, lambda 0.5, r = (0, 0, 8), V = (4, 2, 1).

    delta_3 = 8 - 1 = 7; delta_2 = 0 + 0.5·1 - 2 = -1.5; delta_1 = 0 + 0.5·2 - 4 = -3.
    A_3 = 7; A_2 = -1.5 + 0.25·7 = 0.25; A_1 = -3 + 0.25·0.25 = -2.9375. Returns = A + V.
    """
    advantages, returns = o.gae(t([0, 0, 8, NAN]), t([4, 2, 1, NAN]), mask_of([3], 4), 0.5, 0.5)
    assert torch.equal(advantages, t([-2.9375, 0.25, 7, 0]))
    assert torch.equal(returns, t([1.0625, 2.25, 8, 0]))


def test_gae_does_not_bootstrap_past_the_end():
    """The value after the last valid token is 0, also where padding holds one: A = 1 - 2 = -1."""
    advantages, _ = o.gae(t([1, 5]), t([2, 100]), mask_of([1], 2), 1.0, 0.95)
    assert torch.equal(advantages, t([-1, 0]))


def test_policy_loss_by_hand():
    """Clip 0.2. Ratio 1.5, A = 1: -min(1.5, 1.2) = -1.2, clipped. Ratio 0.5, A = 1: -0.5.

    Ratio 1.5, A = -1: max(1.5, 1.2) = 1.5. Ratio 0.5, A = -1: max(0.5, 0.8) = 0.8, clipped.
    Sum: -1.2 - 0.5 + 1.5 + 0.8 = 0.6.
    """
    ratios, advantages = t([1.5, 0.5, 1.5, 0.5, NAN]), t([1, 1, -1, -1, NAN])
    found = o.policy_loss(
        ratios.log() - 1, torch.full((1, 5), -1.0), advantages, mask_of([4], 5), 0.2, 0.2
    )
    assert float(found.loss_sum) == pytest.approx(0.6)
    assert torch.equal(found.clipped_bt[:, :4], t([1, 0, 0, 1]))
    assert torch.allclose(found.ratio_bt, t([1.5, 0.5, 1.5, 0.5, 1]))


def test_policy_loss_clips_each_side_by_its_own_bound():
    """Low 0.1, high 0.3. Ratio 2, A = 1: -1.3. Ratio 0.5, A = -1: 0.9."""
    found = o.policy_loss(t([2.0, 0.5]).log(), t([0, 0]), t([1, -1]), mask_of([2], 2), 0.1, 0.3)
    assert float(found.loss_sum) == pytest.approx(-1.3 + 0.9)


def test_policy_loss_survives_a_collapsed_probability():
    logprobs = t([0.0, -500.0]).requires_grad_()
    found = o.policy_loss(logprobs, t([-500.0, 0.0]), t([-1, -1]), mask_of([2], 2), 0.2, 0.2)
    found.loss_sum.backward()
    assert torch.isfinite(found.loss_sum) and torch.isfinite(logprobs.grad).all()


def test_policy_loss_of_half_precision_is_computed_in_float32():
    old = torch.full((1, 1), -3.0)
    found = o.policy_loss(old + 0.01, old.bfloat16(), t([1.0]), mask_of([1], 1), 0.2, 0.2)
    assert found.ratio_bt.dtype == torch.float32
    assert float(found.ratio_bt) == pytest.approx(math.exp(0.01), abs=1e-6)


def test_value_loss_by_hand():
    """Clip 0.2 around 1. V = 2 clips to 1.2; return 3: max(1, 3.24) / 2 = 1.62, clipped.

    V = 1.1 stays; return 0: 1.21 / 2 = 0.605. V = 2, return 1: max(1, 0.04) / 2 = 0.5.
    """
    found = o.value_loss(
        t([2, 1.1, 2, NAN]), t([1, 1, 1, NAN]), t([3, 0, 1, NAN]), mask_of([3], 4), 0.2
    )
    assert float(found.loss_sum) == pytest.approx(1.62 + 0.605 + 0.5)
    assert torch.equal(found.clipped_bt, t([1, 0, 0, 0]))


def test_explained_variance_by_hand():
    """Returns (0, 2, 4) vary by 8/3, the errors (0, 1, -1) by 2/3: 1 - 1/4 = 0.75."""
    mask = mask_of([3], 4)
    assert o.explained_variance(t([0, 1, 5, NAN]), t([0, 2, 4, NAN]), mask) == pytest.approx(0.75)
    assert o.explained_variance(t([7, 9, 11, NAN]), t([0, 2, 4, NAN]), mask) == 1  # shift is free
    assert math.isnan(o.explained_variance(t([1, 2, 3, NAN]), t([5, 5, 5, NAN]), mask))


# ----------------------------------------------------- against loops from the papers


def loop_gae(rewards, values, gamma, lam):
    """1506.02438 eq. 16, its sum and not a recursion: A_t = sum_l (gamma lam)^l delta_{t+l}."""
    n = len(rewards)
    delta = [
        rewards[i] + gamma * (values[i + 1] if i + 1 < n else 0.0) - values[i] for i in range(n)
    ]
    return [math.fsum((gamma * lam) ** k * delta[i + k] for k in range(n - i)) for i in range(n)]


@quick
@given(batches, st.floats(0.1, 1), st.floats(0, 1))
def test_gae_is_the_papers_sum(batch, gamma, lam):
    advantages, returns = o.gae(batch.returns, batch.values, batch.mask, gamma, lam)
    for i, n in enumerate(batch.lengths):
        expected = loop_gae(batch.returns[i, :n].tolist(), batch.values[i, :n].tolist(), gamma, lam)
        assert advantages[i, :n].tolist() == pytest.approx(expected, abs=1e-5)
        assert torch.allclose(returns[i, :n], advantages[i, :n] + batch.values[i, :n])
        assert not advantages[i, n:].any() and not returns[i, n:].any()


@quick
@given(batches)
def test_returns_without_discount_are_the_reward_to_go(batch):
    _, returns = o.gae(batch.returns, batch.values, batch.mask, 1.0, 1.0)
    for i, n in enumerate(batch.lengths):
        expected = np.cumsum(batch.returns[i, :n].double().numpy()[::-1])[::-1]
        assert returns[i, :n].numpy() == pytest.approx(expected, abs=1e-5)


@quick
@given(batches, st.floats(0.1, 1))
def test_lambda_0_is_the_one_step_error(batch, gamma):
    advantages, _ = o.gae(batch.returns, batch.values, batch.mask, gamma, 0.0)
    for i, n in enumerate(batch.lengths):
        after = [*batch.values[i, 1:n].tolist(), 0.0]
        expected = batch.returns[i, :n] + gamma * torch.tensor(after) - batch.values[i, :n]
        assert torch.allclose(advantages[i, :n], expected, atol=1e-6)


@quick
@given(batches)
def test_whiten_has_mean_0_and_deviation_1(batch):
    valid = batch.mask.bool()
    x = batch.values
    white = o.whiten(x, batch.mask)[valid]
    scaled = o.whiten(x, batch.mask, shift_mean=False)[valid]
    if len(white) > 1:
        assert white.numpy() == pytest.approx(stats.zscore(x[valid].numpy()), abs=2e-3)
        assert float(white.std(correction=0)) == pytest.approx(1, abs=1e-3)
    assert float(white.mean()) == pytest.approx(0, abs=1e-5)
    assert float(scaled.mean()) == pytest.approx(float(x[valid].mean()), abs=1e-4)


@quick
@given(batches, st.floats(0.01, 0.5), st.floats(0.01, 0.5))
def test_policy_loss_is_eq_7_token_by_token(batch, low, high):
    found = o.policy_loss(batch.logprobs, batch.old, batch.advantages, batch.mask, low, high)
    total = 0.0
    for i, n in enumerate(batch.lengths):
        for k in range(n):
            ratio = math.exp(float(batch.logprobs[i, k]) - float(batch.old[i, k]))
            advantage = float(batch.advantages[i, k])
            total -= min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)
    assert float(found.loss_sum) == pytest.approx(total, rel=1e-4, abs=1e-4)


@quick
@given(batches, st.floats(0.01, 1))
def test_value_loss_token_by_token(batch, clip):
    found = o.value_loss(batch.values, batch.old_values, batch.returns, batch.mask, clip)
    total = 0.0
    for i, n in enumerate(batch.lengths):
        for k in range(n):
            value, old = float(batch.values[i, k]), float(batch.old_values[i, k])
            near, target = min(max(value, old - clip), old + clip), float(batch.returns[i, k])
            total += max((value - target) ** 2, (near - target) ** 2) / 2
    assert float(found.loss_sum) == pytest.approx(total, rel=1e-4, abs=1e-5)


def test_kl_estimators_estimate_the_kl():
    """Their means over 200,000 samples, one normal against another, beside quadrature."""
    p, q = stats.norm(0, 1), stats.norm(0.3, 1.2)
    exact = integrate.quad(lambda x: p.pdf(x) * (p.logpdf(x) - q.logpdf(x)), -10, 10)[0]
    x = p.rvs(200_000, random_state=0)
    logs = [torch.from_numpy(d.logpdf(x)).float().unsqueeze(0) for d in (p, q)]
    kl = o.kl_estimates(*logs, torch.ones(1, len(x)))
    assert float(kl.k1.mean()) == pytest.approx(exact, abs=0.003)
    assert float(kl.k3.mean()) == pytest.approx(exact, abs=0.001)
    assert float(kl.k3.std()) < float(kl.k1.std())


@quick
@given(st.floats(-30, 30), st.floats(-30, 30))
def test_k3_is_never_negative_and_exact(a, b):
    kl = o.kl_estimates(t([a]), t([b]), torch.ones(1, 1))
    ratio = float(np.float32(b) - np.float32(a))
    assert float(kl.k3) >= 0
    if abs(ratio) < o.MAX_LOG_RATIO:
        assert float(kl.k3) == pytest.approx(special.expm1(ratio) - ratio, rel=1e-4, abs=1e-6)


# ------------------------------------------------------------- what must not matter


def everything(b):
    """All results of the module on a batch, rows first."""
    kl = o.kl_estimates(b.logprobs, b.reference, b.mask)
    rewards = o.token_rewards(b.scores, kl.k1, b.mask, 0.05)
    advantages, returns = o.gae(rewards, b.values, b.mask, 1.0, 0.95)
    policy = o.policy_loss(b.logprobs, b.old, b.advantages, b.mask, 0.2, 0.2)
    value = o.value_loss(b.values, b.old_values, b.returns, b.mask, 0.2)
    white = [o.whiten(b.values, b.mask, shift_mean=shift) for shift in (True, False)]
    per_token = [*kl, rewards, advantages, returns, policy.ratio_bt, value.clipped_bt, *white]
    sums = [
        policy.loss_sum,
        value.loss_sum,
        o.masked_mean(b.values, b.mask),
        o.masked_mean(policy.clipped_bt, b.mask),
        o.explained_variance(b.values, b.returns, b.mask),
    ]
    return per_token, [float(s) for s in sums]


@quick
@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(0, 10**6), st.integers(1, 5)
)
def test_the_amount_of_padding_changes_nothing(lengths, seed, extra):
    (tokens, sums), width = everything(Batch(lengths, seed)), max(lengths)
    padded_tokens, padded_sums = everything(Batch(lengths, seed, extra))
    assert padded_sums == pytest.approx(sums, abs=1e-5, nan_ok=True)
    for short, long in zip(tokens, padded_tokens, strict=True):
        assert torch.allclose(short, long[:, :width], atol=1e-5)
        assert torch.isfinite(long).all(), "NaN got out of the padding"


@quick
@given(batches, st.randoms(use_true_random=False))
def test_the_order_of_the_batch_changes_nothing(batch, random):
    tokens, sums = everything(batch)
    order = list(range(len(batch.lengths)))
    random.shuffle(order)
    for name, x in vars(batch).items():
        if isinstance(x, torch.Tensor):
            setattr(batch, name, x[order])
    other_tokens, other_sums = everything(batch)
    assert other_sums == pytest.approx(sums, abs=1e-5, nan_ok=True)
    for a, b in zip(tokens, other_tokens, strict=True):
        assert torch.allclose(a[order], b, atol=1e-5)


def test_nan_in_padding_reaches_no_gradient():
    batch = Batch([3, 1, 5], seed=0)
    clean = Batch([3, 1, 5], seed=0)
    for x in vars(clean).values():
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            x.nan_to_num_(0.0)
    for b in (batch, clean):
        b.logprobs.requires_grad_()
        b.values.requires_grad_()
        policy = o.policy_loss(b.logprobs, b.old, b.advantages, b.mask, 0.2, 0.2)
        value = o.value_loss(b.values, b.old_values, b.returns, b.mask, 0.2)
        k3 = o.masked_mean(o.kl_estimates(b.logprobs, b.reference, b.mask).k3, b.mask)
        (policy.loss_sum + value.loss_sum + k3).backward()
    assert torch.equal(batch.logprobs.grad, clean.logprobs.grad)
    assert torch.equal(batch.values.grad, clean.values.grad)
    assert not batch.logprobs.grad[~batch.mask.bool()].any()
    assert batch.logprobs.grad.any() and batch.values.grad.any()


# -------------------------------------------------------------------------- TRL 1.12


def test_golden_numbers_of_trl():
    inputs, expected = (
        {k: torch.tensor(v) for k, v in GOLDEN[key].items()} for key in ("inputs", "expected")
    )
    setting, mask = GOLDEN["settings"], mask_of(GOLDEN["lengths"], max(GOLDEN["lengths"]))
    n = int(mask.sum())
    kl = o.kl_estimates(inputs["old_logprobs"], inputs["reference_logprobs"], mask)
    rewards = o.token_rewards(inputs["scores"], kl.k1, mask, setting["kl_coef"])
    advantages, returns = o.gae(rewards, inputs["values"], mask, setting["gamma"], setting["lam"])
    white = o.whiten(advantages, mask)
    scaled = o.whiten(advantages, mask, shift_mean=False)
    # TRL divides by n - 1 (Bessel) where the standard deviation here is the biased one.
    bessel = math.sqrt((n - 1) / n)
    mean = o.masked_mean(advantages, mask)
    policy = o.policy_loss(
        inputs["new_logprobs"],
        inputs["old_logprobs"],
        white * bessel,
        mask,
        setting["cliprange"],
        setting["cliprange"],
    )
    value = o.value_loss(
        inputs["new_values"], inputs["values"], returns, mask, setting["cliprange_value"]
    )
    found = {
        "rewards": rewards,
        "advantages": advantages,
        "returns": returns,
        "whitened": white * bessel,
        "scaled": ((scaled - mean) * bessel + mean) * mask,
        "policy_loss": policy.loss_sum / n,
        "policy_clip_fraction": o.masked_mean(policy.clipped_bt, mask),
        "value_loss": value.loss_sum / n,
        "value_clip_fraction": o.masked_mean(value.clipped_bt, mask),
    }
    assert found.keys() == expected.keys()
    for name, x in found.items():
        assert torch.allclose(x, expected[name], atol=2e-6), name
    assert 0 < float(expected["policy_clip_fraction"]) < 1, "the golden batch clips nothing"
    assert 0 < float(expected["value_clip_fraction"]) < 1


# ------------------------------------------------------------------- control and scale


@given(st.lists(st.lists(st.floats(-50, 50), min_size=1, max_size=8), min_size=1, max_size=6))
def test_running_moments_are_those_of_all_numbers(batches):
    moments = o.RunningMoments()
    for batch in batches:
        moments.add(torch.tensor(batch, dtype=torch.float64))
    everything = np.concatenate(batches)
    assert moments.mean == pytest.approx(everything.mean(), abs=1e-9)
    spread = everything.std()
    assert moments.std == pytest.approx(spread if spread > 1e-8 else 1.0, rel=1e-6)


def test_scores_are_scaled_and_clipped_but_never_shifted():
    moments = o.RunningMoments()
    scores = torch.tensor([8.0, 12.0])
    assert o.scaled_scores(scores, moments, None).tolist() == [4.0, 6.0]  # std is 2
    assert o.scaled_scores(scores, None, 9.0).tolist() == [8.0, 9.0]
    assert o.scaled_scores(-scores, None, 9.0).tolist() == [-8.0, -9.0]


def test_the_adapted_coefficient_by_hand():
    # 1909.08593's code: proportional_error = clip(kl/target - 1, -.2, .2); K *= 1 + error n/horizon
    assert o.adapted_kl_coef(0.2, 7.0, 6.0, 10_000, 64) == pytest.approx(
        0.2 * (1 + (1 / 6) * 64 / 10_000)
    )
    assert o.adapted_kl_coef(0.2, 60.0, 6.0, 100, 10) == pytest.approx(0.2 * 1.02)
    assert o.adapted_kl_coef(0.2, -3.0, 6.0, 100, 10) == pytest.approx(0.2 * 0.98)


def test_importance_weights_by_hand():
    now, then = t([-1.0, -2.0, -9.0]), t([-1.5, -1.0, 5.0])
    whole, cut = o.importance_weights(now, then, mask_of([2], 3), 1.2)
    assert torch.allclose(whole, t([math.exp(0.5), math.exp(-1.0), 0.0]))
    assert torch.allclose(cut, t([1.2, math.exp(-1.0), 0.0]))
    never = t([-100.0, 0.0, 0.0])  # a token that the sampler all but excluded
    assert o.importance_weights(t([0, 0, 0]), never, mask_of([2], 3), 3.0)[0].isfinite().all()


def test_weights_multiply_each_token_of_the_policy_loss():
    now, old, advantages = t([-1.0, -2.0, 0.0]), t([-1.1, -2.2, 0.0]), t([1.0, -2.0, 5.0])
    mask, weights = mask_of([2], 3), t([0.5, 2.0, 9.0])
    plain = o.policy_loss(now, old, advantages, mask, 0.2, 0.2)
    single = [
        o.policy_loss(now, old, advantages, mask_of([n], 3), 0.2, 0.2).loss_sum for n in (1, 2)
    ]
    found = o.policy_loss(now, old, advantages, mask, 0.2, 0.2, weights)
    expected = 0.5 * single[0] + 2.0 * (single[1] - single[0])
    assert torch.isclose(found.loss_sum, expected)
    assert torch.equal(found.ratio_bt, plain.ratio_bt)
    same = o.policy_loss(now, old, advantages, mask, 0.2, 0.2, torch.ones_like(mask))
    assert torch.equal(same.loss_sum, plain.loss_sum)
