"""Reading compiled programs: loops, branches, collectives, kernels and large buffers."""

from __future__ import annotations

import pytest

from mmjax.planning.estimate import flops_of
from mmjax.planning.hlo import Program

TEXT = """\
HloModule jit_step, is_scheduled=true

%fused (p: bf16[8,128]) -> bf16[8,128] {
  %p = bf16[8,128]{1,0} parameter(0)
  ROOT %m = bf16[8,128]{1,0} multiply(%p, %p), backend_config={"estimated_cycles":"999"}
}

%async_collective_fusion.1 (q: bf16[16,128]) -> (bf16[16,128], bf16[64,128]) {
  %q = bf16[16,128]{1,0} parameter(0)
  %all-gather.5 = bf16[64,128]{1,0} all-gather(%q), channel_id=7, replica_groups=[2,4]<=[8], dimensions={0}, \
backend_config={"async_collective_fusion_config":{"flag_start":"-1"}}
  ROOT %start = (bf16[16,128]{1,0}, bf16[64,128]{1,0}) custom-call(%all-gather.5), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.2 (r: bf16[16,128]) -> bf16[64,128] {
  %r = bf16[16,128]{1,0} parameter(0)
  %all-gather.6 = bf16[64,128]{1,0} all-gather(%r), channel_id=7, replica_groups=[2,4]<=[8], dimensions={0}, \
backend_config={"async_collective_fusion_config":{"flag_start":"2"}}
  ROOT %done = bf16[64,128]{1,0} custom-call(%all-gather.6), custom_call_target="AsyncCollectiveDone"
}

%all-reduce-scatter.3 (input: f32[64,128]) -> f32[8,128] {
  %input = f32[64,128]{1,0} parameter(0)
  %all-reduce.9 = f32[64,128]{1,0} all-reduce(%input), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %cut = f32[8,128]{1,0} dynamic-slice(%all-reduce.9)
}

%body (state: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %state = (s32[], bf16[8,128]) parameter(0)
  %fusion.1 = bf16[8,128]{1,0} fusion(%state), kind=kLoop, calls=%fused, metadata={op_name="jit(step)/layer"}, \
backend_config={"estimated_cycles":"100"}
  %fusion.2 = (bf16[16,128]{1,0}, bf16[64,128]{1,0}) fusion(%fusion.1), kind=kCustom, calls=%async_collective_fusion.1
  %fusion.3 = bf16[64,128]{1,0} fusion(%fusion.2), kind=kCustom, calls=%async_collective_fusion.2, backend_config={"estimated_cycles":"20"}
  %splash_mha_fwd.1 = bf16[2,8,256,128]{3,2,1,0} custom-call(%grid, %query, %key, %key), custom_call_target="tpu_custom_call"
  %splash_mha_dkv.1 = bf16[2,8,256,128]{3,2,1,0} custom-call(%grid, %query, %query, %query, %place), custom_call_target="tpu_custom_call"
  ROOT %next = (s32[], bf16[8,128]) tuple(%state, %fusion.1)
}

%turning (state.1: (s32[], bf16[8,128])) -> pred[] {
  %bound = s32[] constant(12)
  ROOT %less = pred[] compare(%counter, %bound), direction=LT
}

%cheap (c: bf16[8,128]) -> bf16[8,128] {
  ROOT %c = bf16[8,128]{1,0} parameter(0)
}

%dear (d: bf16[8,128]) -> bf16[8,128] {
  %d = bf16[8,128]{1,0} parameter(0)
  ROOT %copy.1 = bf16[8,128]{1,0} copy(%d), backend_config={"estimated_cycles":"5"}
}

ENTRY %main (a: bf16[8,128]) -> bf16[8,128] {
  %a = bf16[8,128]{1,0} parameter(0)
  %query = bf16[2,8,256,128]{3,2,1,0} parameter(1)
  %key = bf16[2,4,512,128]{3,2,1,0} parameter(2)
  %grid = s8[1,4,4]{2,1,0} constant(0)
  %place = s32[256,128]{1,0} iota()
  %while.1 = (s32[], bf16[8,128]) while(%a), condition=%turning, body=%body
  %conditional.1 = bf16[8,128]{1,0} conditional(%a), branch_computations={%cheap, %dear}
  %scattered = f32[8,128]{1,0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.3
  %all-reduce.1 = f32[1024,1024]{1,0} all-reduce(%a), replica_groups=mesh['x'=4,'y'=2] {'x','y'}, to_apply=%add, metadata={op_name="sum"}
  %permuted = bf16[8,128]{1,0} collective-permute(%a), source_target_pairs={{0,1},{1,0}}
  ROOT %result = bf16[8,128]{1,0} copy(%a), backend_config={"estimated_cycles":"3"}
}
"""


@pytest.fixture(scope="module")
def program():
    return Program(TEXT)


def test_a_loop_counts_as_often_as_it_turns_and_the_dearest_branch_alone(program):
    assert program.runs == {"%main": 1, "%body": 12, "%dear": 1}
    assert program.cycles() == 12 * (100 + 20) + 5 + 3
    assert {i.op: cycles for i, cycles in program.costs()}["jit(step)/layer"] == 1200


def test_collectives_are_counted_once_with_the_bytes_that_a_device_receives(program):
    found = {(c.kind, c.count): c for c in program.collectives()}
    assert set(found) == {("all-gather", 12), ("reduce-scatter", 1), ("all-reduce", 1), ("collective-permute", 1)}
    assert found["all-gather", 12].moved == 12 * 64 * 128 * 2 * 3 / 4
    assert found["reduce-scatter", 1].moved == 64 * 128 * 4 * 3 / 4
    assert found["all-reduce", 1].group == 8 and found["all-reduce", 1].moved == 2 * 4 * 2**20 * 7 / 8
    assert found["collective-permute", 1].moved == 8 * 128 * 2


def test_kernels_count_by_the_shapes_of_queries_and_keys(program):
    forward, backward = program.kernels()
    assert forward.count == 12 and forward.operands[1] == ("bf16", (2, 8, 256, 128))
    assert flops_of(forward) == 12 * 2 * 2 * 2 * 8 * 256 * 512 * 128
    # handed positions, it is causal: of 4 x 4 blocks 10 are computed
    assert flops_of(backward) == 12 * 2 * 4 * 2 * 8 * 256 * 256 * 128 * 10 / 16


def test_large_buffers_are_listed(program):
    assert [(op, size) for op, size, _ in program.large(2**21)] == [("sum", 4.0 * 2**20)]


def test_a_loop_that_only_the_data_end_is_named():
    program = Program(TEXT.replace("%bound = s32[] constant(12)", "%bound = s32[] parameter(1)"))
    assert program.cycles() == 100 + 20 + 5 + 3
    assert program.open_loops == {"%while.1"}
