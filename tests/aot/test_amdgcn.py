"""Reading AMD machine code."""

from benchmarks import amdgcn

LISTING = """
	.text
kernel:                                 ; @kernel
	s_load_dwordx2 s[0:1], s[2:3], 0x0
	v_mfma_f32_16x16x16_bf16 a[0:3], v[0:1], v[2:3], 0
.LBB0_1:                                ; =>This Loop Header: Depth=1
	s_add_i32 s0, s0, 1
.LBB0_2:                                ; =>  This Inner Loop Header: Depth=2
	v_exp_f32_e32 v1, v1
	v_mfma_f32_16x16x16_bf16 a[0:3], v[0:1], v[2:3], a[0:3]
	v_mfma_f32_16x16x16_bf16 a[0:3], v[0:1], v[2:3], a[0:3]
	s_cbranch_scc1 .LBB0_2
	s_cbranch_vccz .LBB0_1
	s_cbranch_scc0 .LBB0_3
.LBB0_3:
	v_exp_f32_e32 v1, v1
	s_endpgm
	.set kernel.num_vgpr, 256
; Occupancy: 1
  - .agpr_count:     6
    .private_segment_fixed_size: 108
    .vgpr_count:     262
    .vgpr_spill_count: 33
"""


def test_the_loop_is_the_smallest_with_most_of_the_work():
    loop = amdgcn.hot_loop(amdgcn.parse(LISTING))
    assert [line.split()[0].split("_")[1] for line in loop] == ["exp", "mfma", "mfma", "cbranch"]


def test_without_work_it_is_the_longest():
    listing = "\n".join(line for line in LISTING.splitlines() if "v_exp" not in line and "v_mfma" not in line)
    assert len(amdgcn.hot_loop(amdgcn.parse(listing))) == 3


def test_a_kernel_without_a_loop():
    code = amdgcn.parse("\tv_exp_f32_e32 v1, v1\n\ts_cbranch_scc0 .LBB0_1\n.LBB0_1:\n\ts_endpgm\n")
    assert amdgcn.hot_loop(code) == ["v_exp_f32_e32 v1, v1", "s_cbranch_scc0 .LBB0_1"]


def test_figures():
    names = ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
    assert [amdgcn.figure(LISTING, name) for name in names] == [262, 33, 108]
    assert amdgcn.occupancy(LISTING) == 1
