"""routing: choices, weights, sort and gradients of every backend against fp64 and transformers."""

import pytest
import torch

import medgpt_kernels as mk
from medgpt_kernels import testing

BACKENDS = [b for b in testing.backend_modules("routing") if b != "reference"]
WITH_VALUES = [b for b in ("reference", *BACKENDS) if b in ("reference", "cpu")]  # may look at them
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SCORINGS = {
    "gpt-oss": {},
    "mixtral": {"scoring": "softmax_topk"},
    "qwen": {"scoring": "softmax_topk", "renormalize": False},
    "deepseek": {"scoring": "sigmoid"},
    "sigmoid": {"scoring": "sigmoid", "renormalize": False},
}
INTEGERS = ("topk_ids", "expert_hist", "expert_offs", "gather_indices", "scatter_indices")

backends = pytest.mark.parametrize("backend", BACKENDS)
not_triton = pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "triton"])
every = pytest.mark.parametrize("backend", ["reference", *BACKENDS])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).split(".")[1])
scorings = pytest.mark.parametrize("options", SCORINGS.values(), ids=SCORINGS)


def make(tokens=37, hidden=72, experts=32, dtype=torch.float32, seed=0):
    """x, weight and bias; logits of about unit size."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, hidden, generator=g)
    weight = torch.randn(experts, hidden, generator=g) * hidden**-0.5
    bias = torch.randn(experts, generator=g) * 0.3
    return [t.to(dtype) for t in (x, weight, bias)]


def distinct_logits(tokens, experts, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, experts, generator=g).to(dtype)


def noise(t, seed):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(t.shape, generator=g, dtype=torch.float32).to(t)


def with_gradients(call, leaves):
    """Every tensor of the RoutingData, and gradients through the weights and the logits."""
    data = call(*leaves)
    outputs = [data.topk_weights, data.logits]
    found = [t for t in leaves if t is not None]
    grads = torch.autograd.grad(outputs, found, [noise(t, 5) for t in outputs])
    return {**data._asdict(), **{f"d_{i}": g for i, g in enumerate(grads)}}


def check(backend, tensors, topk, call=mk.routing, **options):
    """All outputs and gradients by the tolerance rule; fp64 decides who is chosen."""

    def run(name, dtype):
        leaves = [
            None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors
        ]
        with mk.backend(name), testing.poisoned_empty():
            return with_gradients(lambda *t: call(*t, topk, **options), leaves)

    truth, eager = run("reference", torch.float64), run("reference", None)
    actual = run(backend, None)
    for name in truth:
        assert actual[name].is_contiguous()
        testing.assert_close(actual[name], eager[name], truth[name], name=name)
    return actual


# Forward and backward


@backends
@dtypes
@scorings
def test_routing_and_gradients(backend, dtype, options):
    check(backend, make(dtype=dtype), 4, **options)


@backends
@pytest.mark.parametrize(
    ("tokens", "hidden", "experts", "topk"),
    [
        (1, 64, 32, 4),
        (2, 40, 32, 1),
        (7, 65, 5, 5),
        (33, 33, 3, 2),
        (129, 96, 128, 8),
        (50, 64, 200, 6),
        (16, 2880, 32, 4),
        (300, 32, 16, 2),
        (3, 1, 1, 1),
    ],
)
def test_shapes(backend, tokens, hidden, experts, topk):
    check(backend, make(tokens, hidden, experts), topk)


@not_triton
@scorings
@pytest.mark.parametrize(
    ("tokens", "experts", "topk"),
    [(1, 32, 4), (16, 32, 4), (5, 128, 8), (3, 256, 16), (2, 7, 7), (16, 33, 2), (0, 32, 4)],
)
def test_few_tokens(backend, options, tokens, experts, topk):
    """Decoding, where one launch does it all."""
    check(backend, make(tokens, 96, experts), topk, **options)


@not_triton
@pytest.mark.parametrize(("tokens", "topk"), [(31, 5), (33, 5), (95, 12), (257, 5)])
def test_given_logits_of_many_tiles(backend, tokens, topk):
    check(backend, [distinct_logits(tokens, 40)], topk, call=mk.routing_from_logits)


@backends
@dtypes
def test_activations_with_outliers(backend, dtype):
    x, weight, bias = make(hidden=288, dtype=dtype)
    x = testing.realistic(*x.shape, dtype=dtype, seed=3)
    check(backend, (x, weight, bias), 4)


@backends
@scorings
def test_given_logits(backend, options):
    check(backend, [distinct_logits(37, 32)], 4, call=mk.routing_from_logits, **options)


@backends
def test_without_bias(backend):
    x, weight, _ = make()
    check(backend, (x, weight, None), 4)


@backends
@dtypes
def test_fp32_bias(backend, dtype):
    x, weight, _ = make(dtype=dtype)
    bias = make()[2]

    def run(name, wide):
        leaves = [t.to(wide).requires_grad_() if wide else t.detach().clone().requires_grad_()
                  for t in (x, weight, bias)]  # fmt: skip
        with mk.backend(name):
            return with_gradients(lambda *t: mk.routing(*t, 4), leaves)

    truth, eager = run("reference", torch.float64), run("reference", None)
    for name, value in run(backend, None).items():
        testing.assert_close(value, eager[name], truth[name], name=name)


@backends
def test_correction_bias_chooses_and_does_not_weigh(backend):
    x, weight, bias = make()
    correction = noise(bias, 9)
    options = {"scoring": "sigmoid", "correction_bias": correction}
    found = check(backend, (x, weight, bias), 4, **options)
    plain = mk.routing(x, weight, bias, 4, scoring="sigmoid")
    assert not torch.equal(found["topk_ids"], plain.topk_ids)
    scores = found["logits"].sigmoid().gather(1, found["topk_ids"].long())
    torch.testing.assert_close(found["topk_weights"], scores / scores.sum(-1, keepdim=True))


@backends
@scorings
def test_given_decisions(backend, options):
    """Other experts than the largest, in any order, one of them twice."""
    x, weight, bias = make()
    ids = torch.randint(0, 32, (37, 4), generator=torch.Generator().manual_seed(1))
    ids[3] = 7
    found = check(backend, (x, weight, bias), 4, topk_ids=ids, **options)
    assert torch.equal(found["topk_ids"], ids.int())
    logits = [distinct_logits(37, 32)]
    check(backend, logits, 4, call=mk.routing_from_logits, topk_ids=ids.int(), **options)


@backends
@scorings
def test_replay_repeats_the_forward(backend, options):
    x, weight, bias = make(dtype=torch.bfloat16)
    with mk.backend(backend):
        first = mk.routing(x, weight, bias, 4, **options)
        again = mk.routing(x, weight, bias, 4, topk_ids=first.topk_ids, **options)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@every
def test_ids_and_weights_of_another_router(backend):
    ids = torch.randint(0, 9, (301, 3), generator=torch.Generator().manual_seed(2))
    weights = torch.rand(301, 3, dtype=torch.bfloat16, requires_grad=True)
    with mk.backend(backend), testing.poisoned_empty():
        data = mk.routing_from_topk(ids, weights, 9)
    expect_sorted(data, 9)
    assert data.logits is None
    assert data.topk_weights.dtype == torch.float32
    (grad,) = torch.autograd.grad(data.topk_weights.sum(), weights)
    assert torch.equal(grad, torch.ones_like(weights))


# Properties


def expect_sorted(data, experts):
    """hist, offs and both permutations, from their definitions alone."""
    ids = data.topk_ids.long()
    tokens, topk = ids.shape
    flat, offs = ids.flatten(), data.expert_offs.long()
    assert all(t.dtype == torch.int32 for t in data[1:6])
    assert torch.equal(data.expert_hist.long(), torch.bincount(flat, minlength=experts))
    assert torch.equal(offs.diff(), data.expert_hist.long())
    assert offs[0] == 0
    slots = torch.arange(tokens * topk)
    scatter, gather = data.scatter_indices.long(), data.gather_indices.long()
    assert torch.equal(scatter.sort().values, slots)
    assert torch.equal(gather[scatter], slots // topk if topk else slots)
    order = scatter.argsort()  # the slot of each row
    assert torch.equal(flat[order], flat.sort().values)
    same = flat[order].diff() == 0
    assert (order.diff()[same] > 0).all(), "rows of one expert leave token order"


@every
@pytest.mark.parametrize(
    ("tokens", "experts", "topk"), [(4096, 32, 4), (1500, 128, 8), (999, 3, 3)]
)
def test_sort_is_stable(backend, tokens, experts, topk):
    """Enough slots for several threads or programs; the interpreter is slow."""
    tokens = tokens // 8 if backend == "triton" else tokens
    with mk.backend(backend), testing.poisoned_empty():
        expect_sorted(mk.routing_from_logits(distinct_logits(tokens, experts), topk), experts)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b == "triton"])
def test_many_tiles_are_scanned(backend, monkeypatch):
    from medgpt_kernels.routing import triton

    logits = distinct_logits(210, 8)
    expected = mk.routing_from_logits(logits, 3)
    monkeypatch.setattr(triton, "FEW_TILES", 3)
    with mk.backend(backend), testing.poisoned_empty():
        found = mk.routing_from_logits(logits, 3)
        again = mk.routing_from_topk(found.topk_ids, found.topk_weights, 8)
    for data in (found, again):
        for name in INTEGERS:
            assert torch.equal(getattr(data, name), getattr(expected, name)), name


@every
@pytest.mark.parametrize("experts", [8, 32, 100])
def test_ties_go_to_the_lower_id(backend, experts):
    g = torch.Generator().manual_seed(0)
    logits = torch.randint(-1, 2, (64, experts), generator=g).float()
    logits[::2] *= -0.0  # zeros of both signs are one value
    expected = (-logits).double().sort(dim=-1, stable=True).indices[:, :6].int()
    with mk.backend(backend):
        found = mk.routing_from_logits(logits, 6)
        assert torch.equal(found.topk_ids, expected)
        scores = mk.routing_from_logits(
            logits, 6, scoring="sigmoid", correction_bias=torch.zeros(experts)
        )
    assert torch.equal(scores.topk_ids, expected)


@every
def test_experts_at_minus_infinity_come_last(backend):
    logits = distinct_logits(20, 8)
    logits[:, [1, 5]] = -torch.inf
    with mk.backend(backend):
        found = mk.routing_from_logits(logits, 8)
    assert torch.equal(found.topk_ids[:, 6:], torch.tensor([1, 5]).int().expand(20, 2))
    assert (found.topk_weights[:, 6:] == 0).all()
    assert found.topk_weights.isfinite().all()


@backends
def test_repeats_bitwise(backend):
    """The same bits each time, in the forward and in every gradient."""
    tensors = [t.requires_grad_() for t in make(257, 96)]
    with mk.backend(backend):
        runs = [with_gradients(lambda *t: mk.routing(*t, 4), tensors) for _ in range(3)]
    for name, first in runs[0].items():
        assert all(torch.equal(first, other[name]) for other in runs[1:]), name


@backends
def test_strided_rows_are_read_in_place(backend):
    x, weight, bias = make()
    wide = torch.full((37, 100), float("nan"))
    wide[:, 8:80] = x
    for view in (wide[:, 8:80], x.T.contiguous().T):
        with mk.backend(backend):
            found, expected = mk.routing(view, weight, bias, 4), mk.routing(x, weight, bias, 4)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_cpu_threads_do_not_change_results(threads):
    before = torch.get_num_threads()
    tensors = [t.requires_grad_() for t in make(150, 96)]
    with mk.backend("cpu"):
        expected = with_gradients(lambda *t: mk.routing(*t, 4), tensors)
        try:
            torch.set_num_threads(threads)
            found = with_gradients(lambda *t: mk.routing(*t, 4), tensors)
        finally:
            torch.set_num_threads(before)
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


@every
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_default_dtype_is_not_read(backend, default):
    """A process that loads a model in bf16 often leaves it the default."""
    tensors = [t.requires_grad_() for t in make(300, 96)]
    before = torch.get_default_dtype()
    with mk.backend(backend):
        expected = with_gradients(lambda *t: mk.routing(*t, 4), tensors)
        logits = expected["logits"].detach().requires_grad_()
        expected_again = with_gradients(lambda t: mk.routing_from_logits(t, 4), [logits])
        try:
            torch.set_default_dtype(default)
            found = with_gradients(lambda *t: mk.routing(*t, 4), tensors)
            again = with_gradients(lambda t: mk.routing_from_logits(t, 4), [logits])
        finally:
            torch.set_default_dtype(before)
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name
        assert value.dtype == expected[name].dtype, name
    assert torch.equal(again["topk_weights"], expected_again["topk_weights"])
    assert again["d_0"].dtype == torch.float32


# Losses


@pytest.mark.parametrize("masked", [False, True])
def test_losses_equal_transformers(masked):
    from transformers.models.gpt_oss.modeling_gpt_oss import load_balancing_loss_func

    tensors = [t.requires_grad_() for t in make(24)]
    layers = [mk.routing(tensors[0] * s, *tensors[1:], 4) for s in (1, 2, 3)]
    mask = torch.tensor([1, 1, 0, 1, 1, 0, 0, 1] * 3).view(2, 12) if masked else None
    theirs = load_balancing_loss_func(tuple(d.logits for d in layers), 32, 4, mask)
    ours = mk.load_balancing_loss(layers, mask)
    torch.testing.assert_close(ours, theirs)
    grads = [torch.autograd.grad(loss, tensors, retain_graph=True) for loss in (ours, theirs)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)
    z = torch.cat([torch.logsumexp(d.logits, -1) for d in layers]) ** 2
    if masked:
        z = z[mask.flatten().bool().repeat(3)]
    torch.testing.assert_close(mk.router_z_loss(layers, mask), z.mean())


@backends
@dtypes
def test_gradients_through_all_three(backend, dtype):
    """topk_weights, load_balancing_loss and router_z_loss at once, as a trainer has them."""
    tensors = make(dtype=dtype)
    d_w = noise(torch.empty(37, 4), 5)

    def run(name, wide):
        leaves = [t.detach().to(wide).requires_grad_() for t in tensors]
        with mk.backend(name):
            data = mk.routing(*leaves, 4)
            loss = (data.topk_weights * d_w).sum() + mk.load_balancing_loss(data)
            loss = loss + 0.1 * mk.router_z_loss([data, data])
            return torch.autograd.grad(loss, leaves)

    truth, eager = run("reference", torch.float64), run("reference", dtype)
    for i, (a, e, t) in enumerate(zip(run(backend, dtype), eager, truth, strict=True)):
        testing.assert_close(a, e, t, name=f"d_{i}")


@scorings
def test_reference_gradcheck(options):
    tensors = [t.double().requires_grad_() for t in make(5, 6, 7)]

    def call(*leaves):
        data = mk.routing(*leaves, 3, **options)
        losses = mk.load_balancing_loss(data), mk.router_z_loss(data)
        return data.topk_weights, data.logits, *losses

    with mk.backend("reference"):
        assert torch.autograd.gradcheck(call, tensors)


@scorings
def test_reference_gradcheck_of_given_decisions(options):
    logits = distinct_logits(5, 7, torch.float64).requires_grad_()
    ids = torch.tensor([[0, 1], [3, 3], [6, 2], [5, 0], [1, 1]])

    def call(logits):
        return mk.routing_from_logits(logits, 2, topk_ids=ids, **options).topk_weights

    with mk.backend("reference"):
        assert torch.autograd.gradcheck(call, logits)


# transformers' routers


def their_router(name, **options):
    """One of transformers' router modules with our weights; returns (module, our options)."""
    import importlib

    folder, config_class, router, names, ours = {
        "gpt-oss": ("gpt_oss", "GptOssConfig", "GptOssTopKRouter", "num_local_experts", {}),
        "mixtral": ("mixtral", "MixtralConfig", "MixtralTopKRouter", "num_local_experts",
                    SCORINGS["mixtral"]),
        "qwen3": ("qwen3_moe", "Qwen3MoeConfig", "Qwen3MoeTopKRouter", "num_experts",
                  {"scoring": "softmax_topk", "renormalize": options.get("norm_topk_prob")}),
        "deepseek": ("deepseek_v3", "DeepseekV3Config", "DeepseekV3TopkRouter", "n_routed_experts",
                     SCORINGS["deepseek"]),
    }[name]  # fmt: skip
    module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    config_module = importlib.import_module(f"transformers.models.{folder}.configuration_{folder}")
    config = getattr(config_module, config_class)(
        hidden_size=72, num_experts_per_tok=4, **{names: 16}, **options
    )
    return getattr(module, router)(config), ours


@every
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gpt-oss", {}),
        ("mixtral", {}),
        ("qwen3", {"norm_topk_prob": True}),
        ("qwen3", {"norm_topk_prob": False}),
        ("deepseek", {"n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0}),
    ],
)
def test_equals_transformers(backend, name, options):
    """Logits, weights, ids and gradients; DeepSeek's experts in its own, unsorted order."""
    router, ours = their_router(name, **options)
    x, weight, bias = make(experts=16)
    biased = getattr(router, "bias", None) is not None
    inputs = [x, weight, bias] if biased else [x, weight]
    if name == "deepseek":
        ours = {**ours, "correction_bias": noise(bias, 9)}
        router.e_score_correction_bias.copy_(ours["correction_bias"])

    def by_id(logits, weights, ids, leaves):
        order = ids.long().argsort(-1)
        outputs = [logits, weights.gather(1, order)]
        grads = torch.autograd.grad(outputs, leaves, [noise(t, 5) for t in outputs])
        ids = ids.gather(1, order).int()
        return {"logits": logits, "weights": outputs[1], "ids": ids} | {
            f"d_{i}": g for i, g in enumerate(grads)
        }

    def theirs(dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in inputs]
        tensors = dict(zip(("weight", "bias"), leaves[1:], strict=False))
        call = torch.func.functional_call
        return by_id(*call(router.to(dtype), tensors, (leaves[0],)), leaves)

    def mine(dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in inputs]
        data = mk.routing(*leaves, *([] if biased else [None]), 4, **ours)
        return by_id(data.logits, data.topk_weights, data.topk_ids, leaves)

    eager = theirs(torch.float32)
    if name == "gpt-oss":  # the others compute in fp32 whatever they are given
        truth = theirs(torch.float64)
    else:
        with mk.backend("reference"):
            truth = mine(torch.float64)
    for key in truth:  # theirs is as near to the truth as fp32 comes: the two agree
        torch.testing.assert_close(eager[key].to(truth[key]), truth[key], rtol=1e-4, atol=1e-5)
    with mk.backend(backend):
        found = mine(torch.float32)
    for key in truth:
        testing.assert_close(found[key], eager[key], truth[key], name=key)


# Edges


@every
@scorings
def test_no_tokens(backend, options):
    tensors = [t.requires_grad_() for t in make(0)]
    with mk.backend(backend), testing.poisoned_empty():
        found = with_gradients(lambda *t: mk.routing(*t, 4, **options), tensors)
        data = mk.routing_from_topk(torch.zeros(0, 4, dtype=torch.int32), torch.zeros(0, 4), 32)
    for key in ("topk_weights", "topk_ids"):
        assert found[key].shape == (0, 4)
    for made in (found["expert_offs"], data.expert_offs):
        assert torch.equal(made, torch.zeros(33, dtype=torch.int32))
    assert found["d_0"].shape == (0, 72)
    assert (found["d_1"] == 0).all()
    assert (found["d_2"] == 0).all()


@backends
@pytest.mark.parametrize("experts", [1, 5, 32])
@scorings
def test_every_expert_is_chosen(backend, experts, options):
    found = check(backend, make(19, 48, experts), experts, **options)
    assert torch.equal(found["expert_hist"], torch.full((experts,), 19, dtype=torch.int32))


@backends
@pytest.mark.parametrize("expert", [0, 31])
def test_one_expert_takes_every_token(backend, expert):
    x, weight, bias = make(200)
    bias = bias.clone()
    bias[expert] = 50
    found = check(backend, (x, weight, bias), 1)
    assert found["expert_hist"][expert] == 200
    assert torch.equal(found["gather_indices"], torch.arange(200).int())


@every
@pytest.mark.parametrize("size", [80.0, 1e4, 1e30])
def test_large_logits_do_not_overflow(backend, size):
    logits = distinct_logits(9, 8) * size
    for options in SCORINGS.values():
        with mk.backend(backend):
            data = mk.routing_from_logits(logits.requires_grad_(), 3, **options)
            (grad,) = torch.autograd.grad(data.topk_weights.sum(), logits)
        assert data.topk_weights.isfinite().all()
        assert grad.isfinite().all()


# Negative controls: the checks must notice each of these


def expect_noticed(actual, eager, truth):
    testing.assert_close(eager, eager, truth)
    with pytest.raises(testing.ToleranceError):
        testing.assert_close(actual, eager, truth)


def test_ties_to_the_higher_id_are_noticed():
    logits = torch.zeros(3, 8)
    wrong = 7 - logits.flip(-1).sort(dim=-1, descending=True, stable=True).indices[:, :2]
    right = mk.routing_from_logits(logits, 2).topk_ids
    expect_noticed(wrong.int(), right, right)


@pytest.mark.parametrize("wrong", ["not renormalised", "softmax over all", "bias in the weights"])
def test_wrong_weights_are_noticed(wrong):
    logits, correction = distinct_logits(37, 32), noise(torch.empty(32), 9)
    options = {"scoring": "sigmoid", "correction_bias": correction}
    if wrong == "softmax over all":
        options = {}
    truth = mk.routing_from_logits(logits.double(), 4, **options)
    eager = mk.routing_from_logits(logits, 4, **options)
    ids = eager.topk_ids.long()
    if wrong == "not renormalised":
        weights = logits.sigmoid().gather(1, ids)
    elif wrong == "softmax over all":
        weights = logits.softmax(-1).gather(1, ids)
    else:
        weights = (logits.sigmoid() + correction).gather(1, ids)
        weights = weights / weights.sum(-1, keepdim=True)
    expect_noticed(weights, eager.topk_weights, truth.topk_weights)


def test_rounded_logits_are_noticed():
    """What transformers computes in bf16: the product rounded before top-k and softmax."""
    tensors = make(dtype=torch.bfloat16)
    truth = mk.routing(*(t.double() for t in tensors), 4)
    eager = mk.routing(*tensors, 4)
    x, weight, bias = tensors
    expect_noticed((x @ weight.T + bias).float(), eager.logits, truth.logits)


@pytest.mark.parametrize("wrong", ["no mean", "one of two", "no loss"])
def test_wrong_gradients_are_noticed(wrong):
    logits = distinct_logits(37, 32)
    ids = torch.zeros(37, 2, dtype=torch.int64) if wrong == "one of two" else None

    def run(dtype):
        leaf = logits.to(dtype).requires_grad_()
        data = mk.routing_from_logits(leaf, 2, topk_ids=ids, scoring="sigmoid")
        loss = (data.topk_weights * torch.tensor([1.0, 3.0])).sum()
        loss = loss + 10 * mk.router_z_loss(data)
        return data, torch.autograd.grad(loss, leaf)[0]

    (data, eager), (_, truth) = run(torch.float32), run(torch.float64)
    wrong_grad = eager.clone()
    if wrong == "no loss":
        leaf = data.logits.detach().requires_grad_()
        wrong_grad -= torch.autograd.grad(10 * leaf.logsumexp(-1).square().mean(), leaf)[0]
    else:
        s = data.logits.gather(1, data.topk_ids.long()).sigmoid()
        w, d_w = data.topk_weights.detach(), torch.tensor([1.0, 3.0])
        mean = (w * d_w).sum(-1, keepdim=True)
        extra = w * mean * (1 - s) if wrong == "no mean" else -w * (d_w - mean) * (1 - s)
        column = data.topk_ids.long() if wrong == "no mean" else data.topk_ids[:, :1].long()
        wrong_grad.scatter_add_(1, column, extra.detach()[:, : column.shape[1]])
    expect_noticed(wrong_grad, eager, truth)


@pytest.mark.parametrize("wrong", ["unstable", "inverse", "offsets"])
def test_wrong_sort_is_noticed(wrong):
    data = mk.routing_from_logits(distinct_logits(64, 8), 2)
    expect_sorted(data, 8)
    if wrong == "unstable":  # two rows of expert 0 change places
        rows, gather = data.scatter_indices.clone(), data.gather_indices.clone()
        a, b = (rows == 0).nonzero().item(), (rows == 1).nonzero().item()
        rows[a], rows[b] = 1, 0
        gather[[0, 1]] = gather[[1, 0]]
        data = data._replace(scatter_indices=rows, gather_indices=gather)
    elif wrong == "inverse":
        data = data._replace(scatter_indices=data.scatter_indices.argsort().int())
    else:
        data = data._replace(expert_offs=data.expert_offs.roll(1))
    with pytest.raises(AssertionError):
        expect_sorted(data, 8)


# Bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"topk": 33}, r"topk in 1 ... 32 \(experts\), got 33"),
        ({"topk": 0}, r"topk in 1 ... 32 \(experts\), got 0"),
        ({"topk": 2.0}, r"topk in 1 ... 32 \(experts\), got 2.0"),
        ({"x": torch.zeros(37, 71)}, r"x \[T, H\] and weight \[E, H\], H >= 1, got \[37, 71\]"),
        ({"x": torch.zeros(37, 0), "weight": torch.zeros(32, 0)}, r"H >= 1, got \[37, 0\]"),
        ({"x": torch.zeros(2, 37, 72)}, r"x \[T, H\]"),
        ({"x": torch.zeros(37, 72).bfloat16()}, "one float dtype, got torch.bfloat16 and torch.fl"),
        ({"x": torch.zeros(37, 72).int(), "weight": torch.zeros(32, 72).int()}, "one float dtype"),
        ({"bias": torch.zeros(31)}, r"bias torch.float32 or float32 \[32\], got .*\[31\]"),
        ({"bias": torch.zeros(32).half()}, "got torch.float16"),
        ({"scoring": "softmax"}, "scoring one of topk_softmax, softmax_topk, sigmoid, got 'softm"),
        ({"renormalize": False}, "renormalize=True with scoring topk_softmax"),
        ({"correction_bias": torch.zeros(32)}, "scoring sigmoid with correction_bias, got topk_so"),
        ({"correction_bias": torch.zeros(3), "scoring": "sigmoid"}, r"correction_bias \[32\]"),
        ({"correction_bias": torch.zeros(32).int(), "scoring": "sigmoid"}, "float correction_bias"),
        ({"topk_ids": torch.zeros(37, 3, dtype=torch.int32)}, r"\[37, 4\], got .*\[37, 3\]"),
        ({"topk_ids": torch.zeros(37, 4)}, "topk_ids int32 or int64"),
        ({"topk_ids": torch.full((37, 4), 32)}, r"topk_ids in 0 ... 31, got 32 ... 32"),
        ({"topk_ids": torch.full((37, 4), -1)}, r"topk_ids in 0 ... 31, got -1 ... -1"),
    ],
)  # fmt: skip
def test_refuses(change, message):
    x, weight, bias = make()
    arguments = {"x": x, "weight": weight, "bias": bias, "topk": 4} | change
    with pytest.raises(ValueError, match="routing: expected.*" + message):
        mk.routing(**arguments)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mk.routing_from_logits(torch.zeros(3, 4).int(), 2), r"float logits \[T, E\]"),
        (lambda: mk.routing_from_logits(torch.zeros(4), 2), r"float logits \[T, E\]"),
        (lambda: mk.routing_from_logits(torch.zeros(3, 4), 5), r"topk in 1 ... 4 \(experts\)"),
        (
            lambda: mk.routing_from_topk(torch.zeros(3, 2).long(), torch.zeros(3, 1), 4),
            r"topk_weights \[3, 2\] as topk_ids, got torch.float32 \[3, 1\]",
        ),
        (
            lambda: mk.routing_from_topk(torch.full((3, 2), 4), torch.zeros(3, 2), 4),
            "topk_ids in 0 ... 3, got 4 ... 4",
        ),
        (lambda: mk.routing_from_topk(torch.zeros(3, 2), torch.zeros(3, 2), 4), "int32 or int64"),
        (lambda: mk.routing_from_topk(torch.zeros(3, 2).int(), torch.zeros(3, 2), 0), "num_exper"),
        (lambda: mk.routing_from_topk(torch.zeros(3, 0).int(), torch.zeros(3, 0), 4), "K >= 1"),
        (
            lambda: mk.routing_from_logits(torch.empty(2**29, 4, device="meta"), 4),
            r"T K below 2\^31 \(int32 indices\), got 536870912 4",
        ),
    ],
)
def test_other_entries_refuse(call, message):
    with pytest.raises(ValueError, match="routing: expected.*" + message):
        call()


@pytest.mark.parametrize("backend", WITH_VALUES)
@pytest.mark.parametrize("wrong", [2**32, 2**32 + 3, -(2**32), 2**63 - 1])
def test_ids_past_int32_are_refused(backend, wrong):
    """Cast to int32 they would be ids of other experts."""
    ids = torch.full((37, 4), wrong)
    with mk.backend(backend):
        with pytest.raises(ValueError, match=r"routing: expected topk_ids in 0 \.\.\. 31"):
            mk.routing(*make(), 4, topk_ids=ids)
        with pytest.raises(ValueError, match=r"routing: expected topk_ids in 0 \.\.\. 31"):
            mk.routing_from_topk(ids, torch.ones(37, 4), 32)


def test_losses_refuse():
    data = mk.routing_from_topk(torch.zeros(3, 2).int(), torch.zeros(3, 2), 4)
    for loss in (mk.load_balancing_loss, mk.router_z_loss):
        with pytest.raises(ValueError, match=r"expected RoutingData with logits, got logits None"):
            loss(data)
        with pytest.raises(ValueError, match="got an empty sequence"):
            loss([])
        with pytest.raises(ValueError, match="one or a sequence, got int"):
            loss(3)
        with pytest.raises(ValueError, match="one or a sequence, got Tensor"):
            loss(torch.zeros(3, 4))
        layers = [mk.routing_from_logits(torch.zeros(3, n), 2) for n in (4, 5)]
        with pytest.raises(ValueError, match=r"as many experts each, got \[4, 5\]"):
            loss(layers)
        with pytest.raises(ValueError, match=r"attention_mask of 3 tokens, got \[4\]"):
            loss(mk.routing_from_logits(torch.zeros(3, 4), 2), torch.ones(4))


@pytest.mark.parametrize("backend", WITH_VALUES)
def test_nan_is_refused(backend):
    x, weight, bias = make()
    x[17, 3] = torch.nan
    with mk.backend(backend):
        with pytest.raises(ValueError, match="routing: expected logits without NaN, got NaN"):
            mk.routing(x, weight, bias, 4)
        with pytest.raises(ValueError, match="routing: expected logits without NaN, got NaN"):
            mk.routing_from_logits(torch.full((3, 4), torch.nan), 2)
        correction = torch.zeros(32)
        correction[5] = torch.nan
        with pytest.raises(ValueError, match="without NaN, got NaN"):
            mk.routing(*make(), 4, scoring="sigmoid", correction_bias=correction)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b == "triton"])
def test_nan_stays_with_its_token(backend):
    """On a GPU nothing waits to look: the weights of that token are NaN, all others are right."""
    x, weight, bias = make()
    with mk.backend(backend):
        expected = mk.routing(x, weight, bias, 4)
        x[17, 3] = torch.nan
        found = mk.routing(x, weight, bias, 4)
    assert found.topk_weights[17].isnan().all()
    rest = torch.arange(37) != 17
    assert torch.equal(found.topk_weights[rest], expected.topk_weights[rest])
    assert torch.equal(found.topk_ids[rest], expected.topk_ids[rest])
    expect_sorted(found, 32)


# The dispatcher's own checks, autocast, and compilation


def test_opcheck():
    ops = torch.ops.medgpt_kernels
    x, weight, bias = (t.requires_grad_() for t in make(9, 16, 8))
    forward = ops.routing_fwd.default
    torch.library.opcheck(forward, (x, weight, bias, None, None, 3, "topk_softmax", True))
    ids = torch.arange(27).view(9, 3) % 8
    correction = torch.zeros(8)
    torch.library.opcheck(forward, (x, weight, None, correction, None, 3, "sigmoid", True))
    torch.library.opcheck(forward, (x, weight, None, None, ids, 3, "softmax_topk", False))
    logits = distinct_logits(9, 8).requires_grad_()
    torch.library.opcheck(
        ops.routing_logits_fwd.default, (logits, None, ids, 3, "softmax_topk", False)
    )
    torch.library.opcheck(ops.routing_sort.default, (ids.int(), 8))


def test_opcheck_backward():
    ops = torch.ops.medgpt_kernels
    x, weight, bias = make(9, 16, 8)
    data = mk.routing(x, weight, bias, 3)
    saved = (data.topk_weights, data.topk_ids, data.logits, "topk_softmax", True)
    d_w, d_logits = torch.ones(9, 3), torch.ones(9, 8)
    torch.library.opcheck(ops.routing_logits_bwd.default, (d_w, *saved))
    for given, wanted in (((d_w, d_logits), [True] * 3), ((None, d_logits), [True, False, False])):
        torch.library.opcheck(ops.routing_bwd.default, (*given, x, weight, bias, *saved, wanted))


@pytest.mark.parametrize("needs", [(0,), (1,), (2,), (0, 2)])
@backends
def test_only_wanted_gradients(backend, needs):
    tensors = make()
    for i in needs:
        tensors[i].requires_grad_()
    leaves = [tensors[i] for i in needs]

    def run(name):
        with mk.backend(name):
            data = mk.routing(*tensors, 4)
            return torch.autograd.grad(data.topk_weights.square().sum(), leaves)

    for a, b in zip(run(backend), run("reference"), strict=True):
        torch.testing.assert_close(a, b)


def test_autocast_keeps_logits_and_weights_in_fp32():
    tensors = [t.requires_grad_() for t in make()]
    with torch.autocast("cpu", torch.bfloat16):
        found = with_gradients(lambda *t: mk.routing(*t, 4), tensors)
    x, weight, bias = (t.detach() for t in tensors)
    expected = mk.routing(x.bfloat16(), weight.bfloat16(), bias, 4)
    assert found["logits"].dtype == found["topk_weights"].dtype == torch.float32
    assert torch.equal(found["logits"], expected.logits)
    assert torch.equal(found["topk_ids"], expected.topk_ids)
    assert all(found[f"d_{i}"].dtype == torch.float32 for i in range(3))


def test_autocast_leaves_fp64_alone():
    """As torch's own: F.linear of fp64 stays fp64 under autocast."""
    tensors = [t.double() for t in make()]
    expected = mk.routing(*tensors, 4)
    with torch.autocast("cpu", torch.bfloat16):
        found = mk.routing(*tensors, 4)
        narrow = mk.routing(*(t.half() for t in make()), 4)
    assert found.logits.dtype == torch.float64
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(narrow.logits, mk.routing(*(t.half().bfloat16() for t in make()), 4).logits)


@every
@scorings
def test_without_gradients(backend, options):
    """Past the dispatcher: the same bits, whoever owns the tensors."""
    tensors = make()
    with mk.backend(backend):
        expected = mk.routing(*tensors, 4, **options)
        x, *parameters = (torch.nn.Parameter(t) for t in tensors)
        for off in (torch.no_grad, torch.inference_mode):
            with off():
                found = mk.routing(x, *parameters, 4, **options)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
            assert not found.topk_weights.requires_grad


@torch.no_grad()
def test_modes_and_autocast_see_the_operator():
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    tensors = make()
    with FakeTensorMode() as mode:
        fake = mk.routing(*(mode.from_tensor(t) for t in tensors), 4)
    assert fake.topk_ids.shape == (37, 4)
    graph = make_fx(lambda *t: mk.routing(*t, 4).topk_ids)(*tensors)
    assert "medgpt_kernels.routing_fwd" in graph.code
    with torch.autocast("cpu", torch.bfloat16), mk.backend("reference"):
        assert mk.routing(*tensors, 4).logits.dtype == torch.float32


@torch.no_grad()
def test_negated_views_are_resolved():
    """Memory of x.conj().imag holds the other sign; only the dispatcher reads that bit."""
    x, weight, bias = make()
    view = torch.complex(torch.zeros(37, 1), x[:, :1]).conj().imag
    assert view.is_neg()
    found = mk.routing(view, weight[:, :1].contiguous(), bias, 4)
    expected = mk.routing(-x[:, :1], weight[:, :1].contiguous(), bias, 4)
    assert torch.equal(found.logits, expected.logits)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_trace_holds_the_operator():
    """Past the dispatcher the outputs would be constants of the trace."""
    x, weight, bias = make()
    traced = torch.jit.trace(
        lambda x: mk.routing(x, weight, bias, 4).logits, (x,), check_trace=False
    )
    assert torch.equal(traced(x + 1), mk.routing(x + 1, weight, bias, 4).logits)


def test_compiles_at_most_twice():
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    _, weight, bias = (t.requires_grad_() for t in make())

    def call(x):
        data = mk.routing(x, weight, bias, 4)
        again = mk.routing_from_logits(data.logits, 4, topk_ids=data.topk_ids)
        other = mk.routing_from_topk(data.topk_ids, data.topk_weights, 32)
        loss = (again.topk_weights.square() + other.topk_weights).sum()
        return loss + mk.load_balancing_loss(data) + mk.router_z_loss(data), data

    step = torch.compile(call, backend=counter, fullgraph=True)
    lengths = torch.randint(2, 400, (50,), generator=torch.Generator().manual_seed(0))
    for n in lengths.tolist():
        x = make(n, seed=n)[0].requires_grad_()
        leaves = (x, weight, bias)
        (loss, data), (expected_loss, expected) = step(x), call(x)
        assert all(torch.equal(a, b) for a, b in zip(data, expected, strict=True))
        grads = (torch.autograd.grad(t, leaves) for t in (loss, expected_loss))
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count <= 2


def test_compiled_call_checks_values():
    """A compiled graph cannot look at ids; the CPU kernel does before it writes."""
    x, weight, bias = make()
    step = torch.compile(
        lambda ids: mk.routing(x, weight, bias, 4, topk_ids=ids), backend="aot_eager",
        fullgraph=True,
    )  # fmt: skip
    ids = torch.zeros(37, 4, dtype=torch.int64)
    assert torch.equal(step(ids).topk_ids, ids.int())
    for wrong in (-1, 32):
        with pytest.raises(ValueError, match=r"routing: expected topk_ids in 0 \.\.\. 31"):
            step(ids + wrong)


@pytest.mark.parametrize("backend", WITH_VALUES)
def test_operator_refuses_ids_out_of_range(backend):
    """The operator itself, past the public checks: what a compiled graph on the CPU would call."""
    for wrong in (-1, 4):
        with (
            mk.backend(backend),
            pytest.raises(ValueError, match=r"routing: expected topk_ids in 0 \.\.\. 3"),
        ):
            torch.ops.medgpt_kernels.routing_sort(torch.full((3, 2), wrong, dtype=torch.int32), 4)
