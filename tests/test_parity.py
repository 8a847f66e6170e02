"""Every memoroid against the equations of its paper, written once more as a loop over time in double precision.

Nothing here is shared with the scripts: parameters are taken apart into the papers' complex matrices.
"""

import functools
import math

import pytest
import torch
from conftest import load_script
from test_memoroid import ROADS, take

WIDTH, OUT, STEPS = 7, 6, 100
TOLERANCE = 1e-5  # relative to the largest value of each tensor
MEMORIES = {  # the script, the class, its arguments
    "FFM": ("dqn_tbb_ffm", "FFM", (WIDTH, OUT, 5, 4)),  # inputs, outputs, traces, contexts
    "LRU": ("dqn_tbb_lru", "LRU", (WIDTH, 8, 0.0, 1.0)),  # width, state, r_min, r_max
    "StackedLRU": ("dqn_tbb_lru", "StackedLRU", (WIDTH, 2, 8, 0.0, 1.0)),  # width, layers, and so on
    "GatedLRU": ("dqn_tbb_glru", "GatedLRU", (WIDTH, 8, 0.0, 1.0)),
    "StackedGatedLRU": ("dqn_tbb_glru", "StackedGatedLRU", (WIDTH, 2, 8, 0.0, 1.0)),
    "MinGRU": ("dqn_tbb_mingru", "MinGRU", (WIDTH, OUT)),
    "S5": ("dqn_tbb_s5", "S5", (WIDTH, 8, 0.001, 0.1)),  # width, state, dt_min, dt_max
    "StackedS5": ("dqn_tbb_s5", "StackedS5", (WIDTH, 2, 8, 0.001, 0.1)),
    "LinearAttention": ("dqn_tbb_linattn", "LinearAttention", (WIDTH, OUT, 3, 4)),  # inputs, outputs, keys, values
}


def normalised(x):
    return (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt()


def before(state, begin):
    return torch.zeros_like(state) if begin else state


def gelu(x):
    return x * (1 + torch.erf(x / 2**0.5)) / 2


def block(y, skip, p):
    """o + GLU(GELU(y)), around LRU and S5."""
    left, right = (p["gate.weight"] @ gelu(y) + p["gate.bias"]).chunk(2)
    return skip + left * torch.sigmoid(right)


def ffm(p, obs, begins):
    """Morad et al. (2023): gated input, fading and turning traces, mixed, gated against a skip."""
    traces, contexts = len(p["alpha"]), len(p["omega"])
    sizes = (traces, traces, OUT, OUT)
    w_pre, w_gi, w_go, w_skip = p["inputs.weight"].split(sizes)
    b_pre, b_gi, b_go, b_skip = p["inputs.bias"].split(sizes)
    w_mix = p["mix.weight"].reshape(OUT, contexts, traces, 2).transpose(1, 2)  # [O, M, C, Re and Im]
    gamma = torch.exp(torch.complex(-p["alpha"].abs()[:, None].expand(-1, contexts), p["omega"].expand(traces, -1)))
    state, out = torch.zeros(traces, contexts, dtype=torch.complex128), []
    for o, begin in zip(obs, begins):
        x = (w_pre @ o + b_pre) * torch.sigmoid(w_gi @ o + b_gi)
        state = gamma * before(state, begin) + x[:, None]
        z = (w_mix[..., 0] * state.real).sum((1, 2)) + (w_mix[..., 1] * state.imag).sum((1, 2)) + p["mix.bias"]
        gate = torch.sigmoid(w_go @ o + b_go)
        out.append(normalised(z) * gate + (w_skip @ o + b_skip) * (1 - gate))
    return torch.stack(out)


def lru(p, obs, begins):
    """Orvieto et al. (2023): h[t] = lambda h[t-1] + exp(gamma) B u[t], y = Re(C h) + D u."""
    decay = torch.exp(torch.complex(-torch.exp(p["nu"]), torch.exp(p["theta"])))
    b = torch.complex(p["B"][:, 0::2], p["B"][:, 1::2]).T  # [P, H]
    c = torch.complex(p["C"][:, 0::2], -p["C"][:, 1::2])  # [H, P]
    state, out = torch.zeros_like(decay), []
    for o, begin in zip(obs, begins):
        u = normalised(o) * p["norm.weight"] + p["norm.bias"]
        state = decay * before(state, begin) + torch.exp(p["gamma"]) * (b @ u.to(b.dtype))
        out.append(block((c @ state).real + p["D"] * u, o, p))
    return torch.stack(out)


def gated_lru(p, obs, begins):
    """h[t] = a[t] h[t-1] + sqrt(1 - |a[t]|^2) i[t] B u[t], where |a[t]| = |lambda| ** r[t]; y = Re(C h) + D u: docs/glru.md"""
    eigenvalue = torch.exp(torch.complex(-torch.exp(p["nu"]), torch.exp(p["theta"])))
    b = torch.complex(p["B"][:, 0::2], p["B"][:, 1::2]).T  # [P, H]
    c = torch.complex(p["C"][:, 0::2], -p["C"][:, 1::2])  # [H, P]
    (w_r, w_i), (b_r, b_i) = p["gates.weight"].chunk(2), p["gates.bias"].chunk(2)
    state, out = torch.zeros_like(eigenvalue), []
    for o, begin in zip(obs, begins):
        u = normalised(o) * p["norm.weight"] + p["norm.bias"]
        r, i = torch.sigmoid(w_r @ u + b_r), torch.sigmoid(w_i @ u + b_i)
        a = torch.exp(torch.complex(-r * torch.exp(p["nu"]), torch.exp(p["theta"])))
        state = a * before(state, begin) + torch.sqrt(1 - a.abs() ** 2) * i * (b @ u.to(b.dtype))
        out.append(block((c @ state).real + p["D"] * u, o, p))
    return torch.stack(out)


def min_gru(p, obs, begins):
    """Feng et al. (2024): h[t] = (1 - z[t]) h[t-1] + z[t] W_h o[t], z = sigmoid(W_z o)."""
    (w_z, w_h), (b_z, b_h) = p["inputs.weight"].chunk(2), p["inputs.bias"].chunk(2)
    state, out = torch.zeros(OUT).double(), []
    for o, begin in zip(obs, begins):
        z = torch.sigmoid(w_z @ o + b_z)
        state = (1 - z) * before(state, begin) + z * (w_h @ o + b_h)
        out.append(state)
    return torch.stack(out)


def s5(p, obs, begins):
    """Smith et al. (2023): zero-order hold of x' = Lambda x + B u, one of each conjugate pair kept, y = 2 Re(C x) + D u."""
    eigenvalues = torch.complex(p["lambda_re"], p["lambda_im"])
    decay = torch.exp(eigenvalues * torch.exp(p["log_step"]))
    b = (1 / eigenvalues * (decay - 1))[:, None] * torch.complex(p["B"][..., 0], p["B"][..., 1]).T  # [P, H]
    c = torch.complex(p["C"][:, 0::2], -p["C"][:, 1::2])  # [H, P]
    state, out = torch.zeros_like(decay), []
    for o, begin in zip(obs, begins):
        u = normalised(o) * p["norm.weight"] + p["norm.bias"]
        state = decay * before(state, begin) + b @ u.to(b.dtype)
        out.append(block(2 * (c @ state).real + p["D"] * u, o, p))
    return torch.stack(out)


def linear_transformer(p, obs, begins):
    """Katharopoulos et al. (2020), eq. 18 to 20, with phi = elu + 1; then MLP, skip, LayerNorm."""

    def phi(x):
        return torch.where(x > 0, x + 1, torch.exp(x))

    layers = sorted({int(name.split(".")[1]) for name in p if name.startswith("mlp.")})
    w_q, w_k, w_v, w_skip = p["inputs.weight"].split((3, 3, 4, OUT))
    b_q, b_k, b_v, b_skip = p["inputs.bias"].split((3, 3, 4, OUT))
    s, z, out = torch.zeros(3, 4).double(), torch.zeros(3).double(), []
    for o, begin in zip(obs, begins):
        query, key, value = phi(w_q @ o + b_q), phi(w_k @ o + b_k), w_v @ o + b_v
        s = before(s, begin) + torch.outer(key, value)
        z = before(z, begin) + key
        y = (query @ s) / (query @ z)
        for i in layers:
            y = p[f"mlp.{i}.weight"] @ y + p[f"mlp.{i}.bias"]
            y = torch.where(y > 0, y, 0.01 * y) if i != layers[-1] else y
        out.append(normalised(y + w_skip @ o + b_skip))
    return torch.stack(out)


def stacked(layer):
    def reference(p, obs, begins):
        for i in range(2):
            prefix = f"layers.{i}."
            obs = layer({k.removeprefix(prefix): v for k, v in p.items() if k.startswith(prefix)}, obs, begins)
        return obs

    return reference


REFERENCES = {
    "FFM": ffm,
    "LRU": lru,
    "StackedLRU": stacked(lru),
    "GatedLRU": gated_lru,
    "StackedGatedLRU": stacked(gated_lru),
    "MinGRU": min_gru,
    "S5": s5,
    "StackedS5": stacked(s5),
    "LinearAttention": linear_transformer,
}


def make(name):
    """A memoroid whose parameters are away from where they start: no gain is one there, no bias zero, no sign given."""
    script, cls, sizes = MEMORIES[name]
    memory = getattr(load_script(script), cls)(*sizes)
    with torch.no_grad():
        for p in memory.parameters():
            if p.requires_grad:
                p += 0.1 * torch.randn_like(p)
        for layer in memory.modules():
            if hasattr(layer, "lambda_re"):
                layer.lambda_re.clamp_(max=-0.1)
    return memory


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", MEMORIES)
def test_values_and_gradients_are_those_of_the_paper(name, seed, road, monkeypatch):
    torch.manual_seed(seed)
    memory = make(name)
    take(road, load_script(MEMORIES[name][0]), monkeypatch)
    obs, begins = torch.randn(STEPS, WIDTH), torch.rand(STEPS) < 0.04
    learned = {k: p for k, p in memory.named_parameters() if p.requires_grad}
    doubles = {k: p.detach().double().requires_grad_() for k, p in learned.items()}

    obs.requires_grad_()
    out = memory(obs, begins)
    weight = torch.randn_like(out)
    ours = torch.autograd.grad(out, [obs, *learned.values()], weight)
    obs = obs.detach().double().requires_grad_()
    expected = REFERENCES[name](doubles, obs, begins)
    theirs = torch.autograd.grad(expected, [obs, *doubles.values()], weight.double())

    for what, a, b in zip(("values", "obs", *learned), (out, *ours), (expected, *theirs)):
        error = (a.double() - b).abs().max() / b.abs().max()
        assert b.abs().max() > 0 and error <= TOLERANCE, f"{what}: {error:.1e} of the largest value"


def hippo_normal(size):
    """A + P P^T of HiPPO-LegS, entry by entry: Gu et al. (2020), eq. 4, Smith et al. (2023), eq. 8 and 9."""
    a = torch.zeros(size, size, dtype=torch.float64)
    for n in range(size):
        for k in range(n + 1):
            a[n, k] = -math.sqrt((2 * n + 1) * (2 * k + 1)) if n > k else -(n + 1)
    p = torch.tensor([math.sqrt(n + 1 / 2) for n in range(size)], dtype=torch.float64)
    return (a + torch.outer(p, p)).to(torch.complex128)


@pytest.mark.parametrize("size", [2, 4, 16, 128])
def test_hippo_n_diagonalises_hippo(size):
    normal = hippo_normal(size)
    eigenvalues, vectors = load_script("dqn_tbb_s5").hippo_n(size)
    assert eigenvalues.dtype == vectors.dtype == torch.complex128
    torch.testing.assert_close(normal @ vectors, vectors * eigenvalues, rtol=0, atol=1e-11 * size)
    torch.testing.assert_close(eigenvalues.real, torch.full((size // 2,), -0.5, dtype=torch.float64))
    whole = torch.cat([vectors, vectors.conj()], dim=1)  # one of each pair, and each pair once
    torch.testing.assert_close(whole.mH @ whole, torch.eye(size, dtype=torch.complex128), rtol=0, atol=1e-11)
    spectrum = torch.linalg.eigvals(normal).imag.sort().values
    torch.testing.assert_close(torch.cat([eigenvalues, eigenvalues.conj()]).imag.sort().values, spectrum, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("dt_min", "dt_max"), [(1e-3, 1e-1), (1e-4, 1e-3)])
def test_s5_starts_with_hippo_at_steps_between_dt_min_and_dt_max(dt_min, dt_max, monkeypatch):
    script = load_script("dqn_tbb_s5")
    monkeypatch.setattr(script, "hippo_n", functools.cache(script.hippo_n))  # a matrix this large takes its time
    memory = script.S5(width=64, state_size=200, dt_min=dt_min, dt_max=dt_max)
    eigenvalues, vectors = script.hippo_n(400)
    torch.testing.assert_close(memory.eigenvalues(), eigenvalues, rtol=1e-6, atol=0)
    steps = memory.log_step.double().exp()
    assert steps.min() >= dt_min * (1 - 1e-6) and steps.max() <= dt_max * (1 + 1e-6)
    quarters = torch.histc(memory.log_step.detach(), 4, math.log(dt_min), math.log(dt_max))
    assert (quarters > 30).all()  # of 50 each: uniform in the logarithm
    # B is V^-1 of a real Gaussian matrix of variance 1 / H: with the conjugate half, V B gives that matrix back
    b = torch.view_as_complex(memory.B.double()).permute(1, 0)
    assert abs((2 * (vectors @ b).real).std() * 64**0.5 - 1) < 0.02
    # C is a complex Gaussian matrix times V, a rotation: its variance, 1 / P, stays
    c = torch.complex(memory.C[:, 0::2], -memory.C[:, 1::2])
    assert abs((c.abs() ** 2).mean() * 200 - 1) < 0.05


@pytest.mark.parametrize(("r_min", "r_max"), [(0.0, 1.0), (0.9, 0.99)])
def test_lru_starts_uniform_on_the_ring_with_normalised_input(r_min, r_max):
    memory = load_script("dqn_tbb_lru").LRU(width=6, state_size=20_000, r_min=r_min, r_max=r_max)
    square = memory.decay().abs() ** 2
    assert (square > 0).all() and (square < 1).all()
    assert square.min() >= r_min**2 * (1 - 1e-6) and square.max() <= r_max**2 * (1 + 1e-6)
    assert (torch.histc(square.float(), 10, r_min**2, r_max**2) > 1800).all()  # of 2,000 each: an area, so the square
    # exp(gamma) is sqrt(1 - |lambda|^2); where that is small, |lambda| in single precision does not hold more of it
    torch.testing.assert_close(torch.exp(2 * memory.gamma.double()), 1 - square, rtol=1e-5, atol=1e-6)
    angle = memory.theta.double().exp()
    assert (angle >= 0).all() and (angle < 2 * math.pi * (1 + 1e-6)).all()
    assert (torch.histc(angle.float(), 10, 0, 2 * math.pi) > 1800).all()
