"""Orders of ops, against what megatron-core's own schedules run, and against counts by hand."""

from collections import Counter
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel_clip.errors import InputError
from parallel_clip.pipeline.orders import (
    OpKind,
    PipelineOp,
    microbatch_group_size,
    peak_graphs,
    peak_graphs_of_step,
    step_orders,
    warmup_forwards,
)

FIRST_PASS = (OpKind.FORWARD_WITHOUT_GRAPH, OpKind.FORWARD_KEEPING_GRAPH)
SECOND_PASS = (OpKind.FORWARD_AGAIN, OpKind.REPLAY, OpKind.BACKWARD)
# ranks, microbatches, chunks
PIPELINES = [
    (1, 1, 1),
    (1, 4, 1),
    (2, 1, 1),
    (2, 5, 1),
    (4, 2, 1),
    (4, 8, 1),
    (2, 2, 2),
    (2, 5, 3),
    (3, 7, 2),
    (4, 4, 2),
    (4, 8, 3),
    (4, 11, 2),
]


@st.composite
def steps(draw):
    """(ranks, microbatches, stash, chunks) that a step may have."""
    ranks = draw(st.integers(1, 5))
    chunks = draw(st.integers(1, 3)) if ranks > 1 else 1
    microbatches = draw(st.integers(ranks if chunks > 1 else 1, 10))
    return ranks, microbatches, draw(st.integers(0, microbatches)), chunks


class SilentPipeline:
    """Stands where megatron-core's communicator does: sends nothing, and receives nothing."""

    def __init__(self, ranks, rank, chunks):
        self.pp_group = SimpleNamespace(size=lambda: ranks, rank=lambda: rank)
        self.virtual_pipeline_model_parallel_size = chunks if chunks > 1 else None
        self.total_stages, self.current_stage = ranks, rank
        self.is_pp_first_stage, self.is_pp_last_stage = rank == 0, rank == ranks - 1
        self.config = None

    def nothing(self, *_, **__):
        return None

    recv_forward = send_forward = recv_backward = send_backward = nothing
    send_forward_recv_forward = send_backward_recv_backward = nothing
    send_forward_recv_backward = send_backward_recv_forward = nothing

    def send_forward_backward_recv_forward_backward(self, *_, **__):
        return None, None


class AllSwitchesOff(SimpleNamespace):
    """A config of megatron-core in which what is not set is off."""

    def __getattr__(self, name):
        return None


@pytest.fixture
def megatron_order(monkeypatch):
    """(rank, ranks, microbatches, chunks, forward_only) -> the (step, microbatch, chunk) that
    megatron-core's schedule runs, with the model's part taken out of it."""
    import torch
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.process_groups_config import ProcessGroupCollection

    ran = []

    def forward_step(*_, current_microbatch, vp_stage=None, **__):
        ran.append(("forward", current_microbatch, vp_stage or 0))
        return ran[-1], 0

    def backward_step(_, output, *__):
        ran.append(("backward", *output[1:]))

    monkeypatch.setattr(schedules, "forward_step", forward_step)
    monkeypatch.setattr(schedules, "backward_step", backward_step)
    on_no_device = SimpleNamespace(**{**vars(torch), "zeros": lambda *_, **__: 0})
    monkeypatch.setattr(schedules, "torch", on_no_device)

    def order(rank, ranks, microbatches, chunks, forward_only):
        ran.clear()
        config = AllSwitchesOff(hidden_size=1)
        if chunks > 1:
            config.virtual_pipeline_model_parallel_size = chunks
            config.microbatch_group_size_per_vp_stage = microbatch_group_size(microbatches, ranks)
        models = [torch.nn.Identity() for _ in range(chunks)]
        for model in models:
            model.config, model.model_type = config, None
        one = SimpleNamespace(size=lambda: 1)
        groups = ProcessGroupCollection(tp=one, cp=one, pp=one, embd=one, pos_embd=one, dp_cp=one)
        if ranks == 1:
            run = schedules.forward_backward_no_pipelining
        elif chunks == 1:
            run = schedules.forward_backward_pipelining_without_interleaving
        else:
            run = schedules.forward_backward_pipelining_with_interleaving
        run(
            forward_step_func=None,
            data_iterator=[None] * chunks,
            model=models,
            num_microbatches=microbatches,
            seq_length=1,
            micro_batch_size=1,
            forward_only=forward_only,
            p2p_communicator=SilentPipeline(ranks, rank, chunks),
            pg_collection=groups,
        )
        return list(ran)

    return order


def as_megatron(order, kinds):
    return [
        ("backward" if op.kind is OpKind.BACKWARD else "forward", op.microbatch, op.chunk)
        for op in order
        if op.kind in kinds
    ]


@pytest.mark.parametrize(("ranks", "microbatches", "chunks"), PIPELINES)
def test_both_passes_are_in_megatron_cores_order(megatron_order, ranks, microbatches, chunks):
    for rank, order in enumerate(step_orders(ranks, microbatches, microbatches // 2, chunks)):
        pipeline = (rank, ranks, microbatches, chunks)
        assert as_megatron(order, FIRST_PASS) == megatron_order(*pipeline, forward_only=True)
        assert as_megatron(order, SECOND_PASS) == megatron_order(*pipeline, forward_only=False)


@pytest.mark.parametrize(("ranks", "microbatches", "chunks"), PIPELINES)
def test_warmup_is_megatron_cores(ranks, microbatches, chunks):
    from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches

    group = microbatch_group_size(microbatches, ranks) if chunks > 1 else None
    for rank in range(ranks):
        pipeline = SilentPipeline(ranks, rank, chunks)
        counts = get_pp_rank_microbatches(
            microbatches, chunks, group, forward_only=False, p2p_communicator=pipeline
        )
        assert warmup_forwards(rank, ranks, microbatches, chunks) == counts[2]


def test_the_order_of_a_small_step():
    first, last = step_orders(ranks=2, microbatches=3, stash=1)
    assert [(op.kind, op.microbatch) for op in first] == [
        (OpKind.FORWARD_WITHOUT_GRAPH, 0),
        (OpKind.FORWARD_WITHOUT_GRAPH, 1),
        (OpKind.FORWARD_KEEPING_GRAPH, 2),
        (OpKind.FORWARD_AGAIN, 0),
        (OpKind.FORWARD_AGAIN, 1),
        (OpKind.BACKWARD, 0),
        (OpKind.REPLAY, 2),
        (OpKind.BACKWARD, 1),
        (OpKind.BACKWARD, 2),
    ]
    assert [(op.kind, op.microbatch) for op in last[3:]] == [
        (OpKind.LOSS, 0),
        (OpKind.FORWARD_AGAIN, 0),
        (OpKind.BACKWARD, 0),
        (OpKind.FORWARD_AGAIN, 1),
        (OpKind.BACKWARD, 1),
        (OpKind.REPLAY, 2),
        (OpKind.BACKWARD, 2),
    ]


@given(steps())
def test_a_step_holds_each_op_once(step):
    ranks, microbatches, stash, chunks = step
    for rank, order in enumerate(step_orders(*step)):
        expected = Counter([PipelineOp(OpKind.LOSS)] * (rank == ranks - 1))
        for chunk in range(chunks):
            for microbatch in range(microbatches):
                if microbatch < microbatches - stash:
                    kinds = OpKind.FORWARD_WITHOUT_GRAPH, OpKind.FORWARD_AGAIN, OpKind.BACKWARD
                else:
                    kinds = OpKind.FORWARD_KEEPING_GRAPH, OpKind.REPLAY, OpKind.BACKWARD
                expected.update(PipelineOp(kind, microbatch, chunk) for kind in kinds)
        assert Counter(order) == expected


def assert_backwards_follow_their_forwards(order):
    graphs = set()
    for op in order:
        where = (op.microbatch, op.chunk)
        if op.kind in (OpKind.FORWARD_KEEPING_GRAPH, OpKind.FORWARD_AGAIN):
            graphs.add(where)
        elif op.kind is OpKind.REPLAY:
            assert where in graphs
        elif op.kind is OpKind.BACKWARD:
            graphs.remove(where)
    assert graphs == set()


@given(steps())
def test_a_backward_follows_the_forward_that_made_its_graph(step):
    for order in step_orders(*step):
        assert_backwards_follow_their_forwards(order)


def test_the_smallest_group_that_megatron_core_takes():
    for ranks in range(1, 65):
        for microbatches in range(ranks, 65):
            taken = [
                group
                for group in range(1, 100)
                if ranks <= group <= microbatches
                and not 0 < microbatches % group < ranks  # as megatron-core words it
            ]
            assert microbatch_group_size(microbatches, ranks) == min(taken)


def test_no_group_for_fewer_microbatches_than_ranks():
    for ranks in range(2, 65):
        for microbatches in range(1, ranks):
            with pytest.raises(InputError, match=f"{ranks} microbatches"):
                microbatch_group_size(microbatches, ranks)


@pytest.mark.parametrize("ranks", [1, 2, 4, 7])
@pytest.mark.parametrize("microbatches", [1, 2, 4, 9])
def test_peak_graphs_of_one_chunk(ranks, microbatches):
    for stash in range(microbatches + 1):
        for rank, order in enumerate(step_orders(ranks, microbatches, stash)):
            assert peak_graphs(order) == stash + min(ranks - rank, microbatches - stash)


@pytest.mark.parametrize(("ranks", "microbatches", "chunks"), [(2, 4, 2), (4, 8, 2), (4, 16, 3)])
def test_peak_graphs_of_interleaved_two_pass(ranks, microbatches, chunks):
    # Korthikanti et al., arXiv 2205.05198, section 4.2.3: the first rank keeps the activations of
    # L (1 + (P - 1) / (P V)) layers, where a chunk has L / (P V).
    first = step_orders(ranks, microbatches, chunks=chunks)[0]
    assert peak_graphs(first) == ranks * chunks + ranks - 1


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"ranks": 2, "microbatches": 4, "stash": 5}, "a stash of 5"),
        ({"ranks": 2, "microbatches": 4, "stash": -1}, "a stash of -1"),
        ({"ranks": 0, "microbatches": 4}, "at least 1"),
        ({"ranks": 1, "microbatches": 4, "chunks": 2}, "2 needs parallel.pipeline of at least 2"),
        ({"ranks": 4, "microbatches": 3, "chunks": 2}, "lower batch.micro"),
    ],
)
def test_steps_that_cannot_be(step, message):
    with pytest.raises(InputError, match=message):
        step_orders(**step)


OF_CHUNKS = st.lists(st.integers(1, 9), min_size=3, max_size=3)


@given(steps(), OF_CHUNKS, OF_CHUNKS)
def test_the_peak_of_a_step_without_its_order(step, sizes, extras):
    ranks, microbatches, stash, chunks = step
    for rank, order in enumerate(step_orders(*step)):
        of_chunks = sizes[:chunks], extras[:chunks]
        found = peak_graphs_of_step(rank, ranks, microbatches, stash, *of_chunks)
        assert found == peak_graphs(order, *of_chunks)


@pytest.mark.parametrize("chunks", [2, 3])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_the_peak_of_many_groups_is_that_of_two(ranks, chunks):
    for groups in range(1, 8):
        for stash in range(0, groups * ranks + 1, ranks):
            orders = step_orders(ranks, groups * ranks, stash, chunks)
            for rank, order in enumerate(orders):
                sizes, extras = [5, 1, 3][:chunks], [9, 2, 4][:chunks]
                found = peak_graphs_of_step(rank, ranks, groups * ranks, stash, sizes, extras)
                assert found == peak_graphs(order, sizes, extras)
