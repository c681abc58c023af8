"""A layout as a value: what fits, and why something does not."""

import pytest

from parallel_clip.config import config_from_dict
from parallel_clip.errors import InputError
from parallel_clip.model.known_models import load_architecture
from parallel_clip.plan.layout_plan import DoesNotFit, make_layout_plan, try_layout_plan
from parallel_clip.stages.costs import stage_cost
from parallel_clip.stages.partition import partition


def config(**sections):
    return config_from_dict(
        {"train": {"steps": 1}, "data": {"train": [{"shards": "none.tar"}]}, **sections}
    )


def test_vit_h_14_on_64_ranks():
    costs = load_architecture("ViT-H-14").costs
    plan = make_layout_plan(
        costs, 64, config(parallel={"tensor": 2, "pipeline": 4}, batch={"global": 8192})
    )
    assert (plan.layout.data, plan.batch.microbatches, len(plan.stages)) == (8, 4, 4)
    assert sum(stage.vision.layers for stage in plan.stages) == 32
    assert plan.stash == 4 and plan.loss_on_all_stages, "no more microbatches than stages"
    assert plan.loss_helpers == 8 and plan.exchange.gathered
    assert plan.microbatch_group is None


def test_virtual_stages_take_turns_in_groups():
    costs = load_architecture("ViT-L-14").costs
    parallel = {"pipeline": 3, "virtual_pipeline": 2}
    plan = make_layout_plan(costs, 3, config(parallel=parallel, batch={"global": 2048}))
    assert plan.batch.microbatches == 8 and plan.microbatch_group == 4
    assert plan.stash == 0 and not plan.loss_on_all_stages


@pytest.mark.parametrize(
    ("world", "sections"),
    [
        (6, {"parallel": {"tensor": 4}}),
        (8, {"parallel": {"tensor": 3}}),
        (8, {"parallel": {"tensor": 3, "pad": True}}),
        (8, {"batch": {"global": 1000}}),
        (2, {"parallel": {"pipeline": 2, "virtual_pipeline": 20}}),
        (4, {"parallel": {"pipeline": 4, "virtual_pipeline": 2}, "batch": {"global": 512}}),
        (1, {"parallel": {"stash": 500}}),
    ],
)
def test_what_does_not_fit_is_a_value_with_the_errors_message(world, sections):
    costs = load_architecture("ViT-B-32").costs
    found = try_layout_plan(costs, world, config(**sections))
    with pytest.raises(InputError) as error:
        make_layout_plan(costs, world, config(**sections))
    assert found == DoesNotFit(str(error.value))


def test_captions_are_work_of_the_text_tower_and_columns_of_the_loss():
    costs = load_architecture("ViT-B-16").costs
    data = {"train": [{"shards": "none.tar", "caption_lines": True}]}
    plans = {
        count: make_layout_plan(
            costs, 5, config(parallel={"pipeline": 5}, data=data | {"captions_per_image": count})
        )
        for count in (1, 8, 32)
    }
    for count, plan in plans.items():
        assert plan.batch.captions == count and plan.batch.global_batch == 32768
        # Nothing is evener by the work of both towers, a text counted so often.
        expected = partition(costs.with_captions(count), 5)
        assert plan.stages == expected
        assert plan.exchange.gathered == (4 * 2 * 32768 * count * 512 <= 2 << 30)
    work = [stage_cost(stage, costs.with_captions(8)) for stage in plans[8].stages]
    as_for_one = [stage_cost(stage, costs.with_captions(8)) for stage in plans[1].stages]
    assert max(work) < max(as_for_one)


def test_a_search_over_layouts_keeps_what_fits():
    costs = load_architecture("ViT-bigG-14").costs
    found = [
        try_layout_plan(costs, 128, config(parallel={"tensor": tensor, "pipeline": pipeline}))
        for tensor in (1, 2, 3, 4, 8)
        for pipeline in (1, 2, 4, 8, 16)
    ]
    fitting = [plan.layout.tensor for plan in found if not isinstance(plan, DoesNotFit)]
    assert sorted(set(fitting)) == [1, 2, 4], "20 text heads"
    assert len(fitting) == 15


def test_stages_are_balanced_by_the_work_of_a_rank_padding_included():
    """Of ViT-B-32's image tower 12 of 16 heads are not padding, of its text tower all."""
    costs = load_architecture("ViT-B-32").costs
    parallel = {"tensor": 8, "pad": True, "pipeline": 3}
    plan = make_layout_plan(costs, 24, config(parallel=parallel))
    assert plan.stages == partition(costs.on_tensor_ranks(8), 3) != partition(costs, 3)
    divided = make_layout_plan(costs, 12, config(parallel=parallel | {"tensor": 4}))
    assert divided.stages == partition(costs.on_tensor_ranks(4), 3)
