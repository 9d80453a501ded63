"""The static model: reading machine code, the bounds, and kernels whose ceiling paper knows."""

import json
import re

import pytest

from medgpt_kernels import aot, sass, static_model

LOOP_OF_TWO = """
        /*0010*/                   MOV R1, c[0x0][0x28] ;
        /*0020*/              @!P0 BRA `(.L_x_0) ;
.L_x_1:
        /*0030*/                   LDGSTS.E.BYPASS.128 [R29], desc[UR20][R12.64], !P3 ;
        /*0040*/                   LDSM.16.M88.4 R32, [R196] ;
        /*0050*/                   HMMA.16816.F32.BF16 R68, R32, R62, R68 ;
        /*0060*/                   HMMA.16816.F32.BF16 R40, R32, R66, R40 ;
        /*0070*/                   MUFU.EX2 R24, R24 ;
        /*0080*/                   FFMA R22, R203, R22, R30 ;
        /*0090*/                   F2FP.BF16.F32.PACK_AB R4, R5, R6 ;
        /*00a0*/              @!PT LDS RZ, [RZ] ;
        /*00b0*/               @P0 CALL.REL.NOINC `(.L_x_0) ;
        /*00c0*/                   BRA `(.L_x_1) ;
.L_x_0:
        /*00d0*/                   FADD R1, R2, R3 ;
.L_x_2:
        /*00e0*/                   HMMA.16816.F32.BF16 R68, R32, R62, R68 ;
        /*00f0*/                   HMMA.16816.F32.BF16 R40, R32, R66, R40 ;
        /*0100*/                   FSEL R22, R203, R22, P1 ;
        /*0110*/                   FSEL R23, R203, R22, P1 ;
        /*0120*/                   MUFU.EX2 R24, R24 ;
        /*0130*/                   MUFU.EX2 R25, R24 ;
        /*0140*/                   FMNMX R23, R203, R22, P1 ;
        /*0148*/                   LDG.E.128 R24, desc[UR20][R12.64] ;
        /*0150*/                   LDS.128 R24, [R24] ;
        /*0160*/                   STS.U8 [R24], R25 ;
        /*0170*/                   SHFL.BFLY PT, R24, R25, 0x1, 0x1f ;
        /*0180*/               @P0 BRA `(.L_x_2) ;
        /*0190*/                   EXIT ;
"""

# as on sm_100: one warp issues the products, and the wait for them lies behind the kernel's end
ELECTED = """
.L_x_10:
        /*1ae0*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*1b10*/               @P2 BRA `(.L_x_8) ;
        /*1b30*/                   UMOV UR34, 0x0 ;
        /*1b40*/                   UMOV UR35, 0x8210490 ;
        /*1ca0*/                   UTCHMMA gdesc[UR12], gdesc[UR14], tmem[UR9], tmem[UR34], idesc[UR35], UPT ;
        /*1cb0*/                   UTCHMMA tmem[UR22], gdesc[UR24], tmem[UR9], tmem[UR34], idesc[UR35], UPT ;
.L_x_8:
        /*1d30*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P4, [UR16], R16 ;
        /*1d40*/              @!P4 BRA `(.L_x_9) ;
.L_x_19:
        /*1d90*/                   FFMA2 R32, R32, R34, R36 ;
        /*2070*/              @!P3 BRA `(.L_x_10) ;
        /*8ee0*/                   EXIT ;
.L_x_9:
        /*8ef0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P4, [UR16], R16 ;
        /*8f00*/              @!P4 BRA `(.L_x_9) ;
        /*8f10*/                   BRA `(.L_x_19) ;
"""  # noqa: E501

WARP_GROUPS = """
.L_x_1:
        /*2dd0*/                   HGMMA.64x128x16.F32.BF16 R24, R152, gdesc[UR12], RZ, !UPT ;
        /*2e40*/                   HGMMA.64x64x16.F32.BF16 R88, gdesc[UR12].tnspB, R88, gsb0 ;
        /*4880*/              @!P0 BRA `(.L_x_1) ;
"""


def test_the_hot_loop_is_that_of_full_tiles():
    """Both loops multiply as much: the masked one has more instructions for it."""
    loop = sass.hot_loop(LOOP_OF_TWO, warps=4)
    assert [item.name for item in loop.all()][:3] == ["LDGSTS", "LDSM", "HMMA"]
    counts = sass.count(loop, warps=4)
    assert counts.flops == 4 * 2 * (2 * 16 * 8 * 16)
    assert counts.issued == 4 * 10
    units = {"matrix": 8, "exp": 4, "fma": 4, "int": 4, "shared": 4, "other": 12}
    assert counts.instructions == units  # of which a guard that is never true is none
    assert counts.shared_bytes == 4 * 512
    assert counts.global_bytes == 4 * 512


@pytest.mark.parametrize(
    ("second", "third", "hot"),
    [("HMMA.16816.F32.BF16", "LDG.E.128", True), ("HMMA.16816.F32.BF16", "LDG.E.64", False),
     ("FADD", "LDG.E.128", False)],
)  # fmt: skip
def test_a_lean_loop_is_hot_if_it_does_the_same_work(second, third, hot):
    """Unlike a LoRA's product behind the main one."""
    lean = f"""
        /*00d0*/                   HMMA.16816.F32.BF16 R68, R32, R62, R68 ;
        /*00e0*/                   {second} R68, R32, R62, R68 ;
        /*00f0*/                   {third} R68, desc[UR4][R32.64] ;
        /*0180*/               @P0 BRA `(.L_x_2) ;
    """
    text = LOOP_OF_TWO.split(".L_x_2:")[0] + ".L_x_2:" + lean
    assert (len(sass.hot_loop(text, 4).all()) == 4) == hot


def test_masked_instructions_by_unit():
    masked = list(sass.loops(sass.parse(LOOP_OF_TWO), sass.is_matrix))[1]
    counts = sass.count(masked, warps=1)
    assert counts.instructions["int"] == 3  # selections and minima
    assert counts.instructions["exp"] == 2
    assert counts.shared_bytes == 512 + 128 + 128  # neither a byte nor a shuffle takes less


def test_elected_warp_counts_once():
    loop = sass.hot_loop(ELECTED, warps=8)
    assert {item.name for item in loop.one_warp} == {"UMOV", "UTCHMMA"}
    counts = sass.count(loop, warps=8)
    assert counts.flops == 2 * (2 * 128 * 128 * 16)
    assert counts.shared_bytes == 2 * 16 * (128 + 128 + 128)  # the second's left side is in tmem
    assert counts.issued == 8 * 9 + 4  # the wait, which is no loop of its own, included
    assert counts.instructions["fma"] == 2 * 8  # two results a thread


def test_warp_groups():
    counts = sass.count(sass.hot_loop(WARP_GROUPS, warps=8), warps=8)
    assert counts.flops == 2 * 2 * 64 * 16 * (128 + 64)
    assert counts.shared_bytes == 2 * 2 * 16 * (128 + 64 + 64)


def test_no_loop():
    assert sass.hot_loop(re.sub("BRA `.*", "NOP ;", LOOP_OF_TWO), 4) is None


def test_the_busiest_unit_is_the_ceiling():
    """A100: 2,048 operations, 64 results, 16 exponentials and 4 instructions a cycle."""
    counts = sass.count(sass.hot_loop(LOOP_OF_TWO, 4), 4)
    found = static_model.bound("kernel", "sm_80", counts)
    expected = {"matrix": 16, "exp": 8, "fma": 2, "imad": 0, "int": 2, "shared": 16, "fill": 32}
    assert {unit: found.cycles[unit] for unit in expected} == expected
    assert found.limit == "fill"
    assert found.percent == pytest.approx(50)
    assert found.tflops == pytest.approx(156, rel=0.01)
    assert found.serial_tflops == pytest.approx(312 * 16 / (16 + 32), rel=0.01)
    assert found.load_gbs == pytest.approx(64 * 108 * 1.41, rel=1e-3)


@pytest.mark.parametrize(
    ("card", "tflops"),
    [("sm_80", 312), ("sm_90", 989), ("sm_100", 2250), ("sm_89", 165), ("sm_120", 209.5)],
)
def test_peaks_are_the_makers(card, tflops):
    assert static_model.RATES[card].peak_tflops == pytest.approx(tflops, rel=0.01)


def test_tables_say_what_they_are():
    static = static_model.bound("k[a-sm_80]", "sm_80", sass.count(sass.hot_loop(LOOP_OF_TWO, 4), 4))
    assert static_model.table([static]).startswith(static_model.LABEL)
    text = static_model.markdown([static, static._replace(card="sm_90", kernel="k[a-sm_90]")])
    assert text.lower().startswith(static_model.LABEL)
    assert "| `k[a]` | fill 50 % | fill 50 % |" in text
    second = [static._replace(card=card, kernel=f"k[a-{card}-2]") for card in ("sm_80", "sm_90")]
    assert "| `k[a-2]` | fill 50 % | fill 50 % |" in static_model.markdown(second)


@pytest.fixture(scope="module")
def paper():
    """The bounds on tests/paper_kernels.py by (variant of the name, card)."""
    pytest.importorskip("triton")
    gate = aot.Gate(modules=("paper_kernels",), static=True)
    jobs = [(n, card) for n, card, _ in gate.jobs() if card in ("sm_80", "sm_90", "sm_100")]
    reports = [gate.submit(*job) for job in jobs]
    yield {(r.result().kernel, r.result().card): r.result().static for r in reports}
    gate.close()


@pytest.mark.aot
class TestQuickOnPaper:
    """In the bounded part of the gate: their names have "quick" in them."""

    @pytest.mark.parametrize("card", ["sm_80", "sm_90"])
    def test_large_tiles_leave_the_matrix_unit_alone(self, paper, card):
        found = paper["_paper_gemm_kernel[128-256]", card]
        assert found.limit == "matrix"
        assert found.percent == pytest.approx(100)
        assert found.flops == 2 * 128 * 256 * 64

    def test_small_tiles_wait_for_data(self, paper):
        found = paper["_paper_gemm_kernel[64-64]", "sm_90"]
        assert found.limit == "fill"
        assert found.percent == pytest.approx(50)

    def test_one_multiprocessor_alone_cannot_feed_tcgen05(self, paper):
        """128 x 256 of it take 48 KB for 512 cycles of products, which take 768 to arrive."""
        found = paper["_paper_gemm_kernel[128-256]", "sm_100"]
        assert found.cycles["matrix"] == 512
        assert found.cycles["shared"] >= 384
        assert found.cycles["fill"] == 768

    @pytest.mark.parametrize("card", ["sm_80", "sm_90", "sm_100"])
    def test_exponentials(self, paper, card):
        found = paper["_paper_exp2_kernel[chains]", card]
        assert found.limit == "exp"
        assert found.cycles["exp"] == 32 * 32 / 16

    def test_multiplications(self, paper):
        """19.5 TFLOP/s are A100's; 128 results a cycle fill every issue slot."""
        found = paper["_paper_fma_kernel[chains]", "sm_80"]
        assert found.limit == "fma"
        a100 = static_model.RATES["sm_80"]
        flops = 2 * 32 * 32 / found.cycles["fma"] * a100.multiprocessors * a100.mhz * 1e6
        assert flops == pytest.approx(19.5e12, rel=0.01)
        found = paper["_paper_fma_kernel[chains]", "sm_90"]
        assert found.cycles["fma"] == 8 <= found.cycles["issue"] <= 9.5

    def test_command(self, tmp_path, capsys):
        where = tmp_path / "static.json"
        arguments = ["--op", "mxfp4", "-k", "dequantize", "bfloat16", "--card", "sm_80"]
        assert aot.main([*arguments, "--json", str(where)]) == 0
        assert static_model.LABEL in capsys.readouterr().out
        assert all(entry["card"] == "sm_80" for entry in json.loads(where.read_text()))
