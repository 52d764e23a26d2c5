"""The reader of PyTorch files against bytes that PyTorch wrote, and against hostile ones.

`OBJECT` was written by torch 2.13 in both formats; here they are read without it.
"""

import base64
import io
import os
import pickle
import struct
import subprocess
import zipfile
import zlib
from collections import OrderedDict

import ml_dtypes
import numpy as np
import pytest

from ddim_jax.weights.torch_files import is_torch_file, load_torch
from tests.torch_writer import FOUR, Call, Name, Storage, dumps, legacy, tensor, zipped

# torch.save of OBJECT below, where "model" is the state_dict() of a Conv2d with values set to
# 0, 1, 2, ..; zlib and base85.
ZIP = zlib.decompress(
    base64.b85decode(
        "c-pm>TW}Lq7{^bNlD27qaw$-"
        "+C|**9lFh9tP+9_p%ObRkKtwQZlWh}7n|#SBw8d%_S_<B{iFiX$`=Y!#jxXpiJn`U*jylfhjL!G~J~2Ldd%$y9Hs>UT2"
        "<T3ClQif5`~Lf#bG|Rzp*kuMs;WXIM-7^bdX&Wp9qUcmUFk@87TQ*NjM#?(xua8vpf{5+(qN0nGwHMu$Ei$T-"
        "nB88Fmgs>RVt2MU~kmG;f^}V*gZz7CyAjVjx)J<vMJV&Q|Y`bmNUBgQ|Uwu8-"
        "4jqF1Fk2f+=oyw2~<DWTf6>fRjsHk#t7KoA^InP#Lw6F&?OjI>>80+Yi;M6N9T$MQ+uh+Etrs!%*Yq@96v5gGuUVDu!t"
        "qOplTzpstjjhq@$*m~<vNQGprBYSn>ZCLyVgQJAILMqxJB)?=8X!QB2~m=~=kgJZo0)@i<=fqj2Rl;#oc9EQ8tE$lXOd"
        "6E^lTeao$`7V~Ute(?*;hyW{fqiRWBj<v9C0|~cPkh-"
        "i+(&)cN8x_zYXSH50EP!Ocxaq`c=!OgHE3ivxI1O+fkz~e4<03;S_}(2NnY%#V+<CNHx*;h#9@mucr;LWg7mxr-fQ}#s"
        "q|3`wWHvt76M!q#L%okh^xAlAhd9mIeB3=drHunza`9!AC~fLFEg{<N|DPsvJFGK1}oSEQ({;muF=!o7HuV?1z;7Sk*R"
        ")+(g-"
        "L*FRM9i4TiNEtmCwxA5@99D%0PUHZ0zH#tXvZoVS7S8XGxhBZdwQIvFQLIGV&+pXuwdD4Q6i8J^%Xx7nPzE!5RkPK#oA"
        "QiE-r=JUc+5^Zf?VZm=_un_FvmYz0mF-9-"
        "XaF~vvOM^Ivk%T2A*rsGASHKwz*8<%f*JI+6^pfJZofvj$kdE3ZE(E<2ZDmr=S+G7fM)5#~)3PQF=q1N#c??*Cem1f{1"
        "iR(sF^CJv-@|DN3~<_@NgJY<y`1(ehG7k!<I63RNyGCpkNnHxjc}e9Uf}caqB#%yC~rUKjba$n-~ij9MsF4m!nn0-"
        "nA!&ii5g)zMAe9Ho0mwPv5mpYobU>US2cJoN(-wokk$JVMgk7Y5I-"
        "E@w{(<QppavfHU`Hz<aG=uG<bvERysvec5(;2=~iv4+bejD-"
        "Z0Kc7e0lz=<XeZx7YoB_3G6_PE<GX&1EzU@2CzovjgyM-"
        "e8=3YRG_7*A@Z!;DYzK_Vg&6(cpb{(+ND7HQ)ntSU26RK2nT7>~HE&E32-gm-hTdhS9U*x(#F|nob)?Q+FoUtK*ni{UY"
        "HSv5zQ}_t}*n_fePhygsiUEn_^h6U6j%s;95l=);k4XtLJyua2Of8fe=CztTk7Z)l(vRZs(6WOZg}UyFq4v|yYzC}Xts"
        "mj>F}oHt}tqm|dX>S9kM+;+>x&4W`%+Q_Ay{E>5noTuBVqq&DK9hpbIm{-"
        "P;VmVSG;YH|{<I|Yga~D0eELS&<*=oh~M#3%VHtzpCjeVZRUb66~FKMu<GO<@!v3-"
        "$nEBasZPb`u1XL6EosE(ZT$>~`^eGUwFFZa-"
        "&D`k8(SU&xcaQ);yN7~l5qY+BoyRY^4n_GW@|6=`xXl(tXA5!J_Pc^EvVh1B(2aUa%9pAQ5%DC4*cysgDeB1MP)jSy5M"
        "&njiMbFM1sv{rk%J^upe1sz5z^(bHL_FrirDNx4d9ElEbBYzSB@(tFqNnQ6{*%+n=if!vhPBg4@v#%je^Pm1B0i^l{dE"
        "b`rzqz9U8MTy6Q8fXNxj$9+nE0^7F>wR{!uyqKJNcU;pP=alMOT*O}>9e*xK8<^UT@u`FHUSV6`&x``Ja+U!CgNTt5E|"
        "sF^h|W+`vvQlx_o>GVM<mP$mzzFS#Air?dHZuSQP!Jyw4@OpzSEdh^5@dg!dAmsBZim%xd@&|p?<($8^o^TT%ZsyWP&0"
        "0RimR?ihTzC#F7K*)lrX*V7M3eOYV!haU>m~gWQ(w~WixFbyt(AX*R3fQk7c0dMSuH8IRH8zkE|!T+PL^F3WJ<A2>`$_"
        "6dsRW^EtZMxLY93m$b7{zu^-"
        "5?k?MlXUn~<#xh(rmkOhimV(pe?nyVlS7R$s^E6Yv_vgTr$SS@AQ{F;I+R4fzAq%1ow$XbeJVtI5)vabc1QnF0MvMB3j"
        ")C#(ibs|<nS=TA*tc5aptrU-=qON46h_z4FofmZ_OGT`DvTpWNB-"
        "F`bomht&<h8<elUK+N)#+Sl4!p;)NO&%gUq3M)j{ca+Ux|)(S@f}4o_Lp<;^dloHlC0D2j!OYSO"
    )
)
LEGACY = zlib.decompress(
    base64.b85decode(
        "c-"
        "n=PS$Eq+6vrjoaS}Ia!%kVl?yv;gksXCCX&cg}YSTucAeLYhTZvT^%YSQ}G=)&JBu&e{Zw1QIbNB+h=kUY_fOj6@BlN&"
        "I;f_XjW23?x&73<kcYbp<bMKvc<ZQzE``pCE{^LI$-91>39R4#(?JA_C(I-h#rRp-"
        "b;5zvwtLoWq88Rsty)@(4j5$``Di>|DjL3$Oph31$vGSgM((({pMJ#D_(4bdxs|+1l#E4SQE;Gcnm=WU)x4eK(Emo^F_"
        "T>7DZqafe7ie3@DlppBOB|^dt*TWVw+k$R$bgP$(ukApvSlxn7-"
        "9wHRtu%Ue2v+Tm&jMGxti@1^UNxHZZ*G@NuVQ{G&;F8q-"
        "ic#h>InO3CA_rj2KLy)7VKmBSWgHjwmC!bSA4P=<*FORBGtf;!_NXX-"
        "!IMQ7xj$n#`~xDI_lUoGEeZdKq@=*yaD^oNapOE7AU?cxfA7&1Hs%hlbM`Tv6)QqQt$DxLR}#S84JZt`?+g7_QZEU2PT"
        "D8{M=tzi2VDXfhMK{rMXV8kBJ3DsJ+BuW?T|YqIBgbN+!=%&NJFTP|}({;b8UY67=j&Pp|#LqAy=AuDg=Rz}uvJGb%<V"
        "db3+cj>r$!|&X48c7`k{?9Mj)-"
        "vu5#i}_)N#}4MVS5OB|1_OoM2oKD0TN>C7!>FS8B#jZ;wVkeLgv3{Ljg_UM)s^B%Z<zl(lCRnV?>bVN%<i`3LIgt?+NK"
        "#(-$6Y^MzqWN#T*;t{x5U>M_2-"
        "sMuhPVULczzPE7xz83xg)0uCw$J^N?;BjKh#Gc@6!tUqI0l}VRIH*Gt?3{u_E$nf(Hs@GP`r$UZn$4(~3g}0OJ}@AtM;"
        "WGd=przQI@3ZuMB&+FKGDV;N#|4?3w+|qz$c#K78`>7G{ZAGo)zq&44!LYPnItQ-"
        "E2ErO{sW3FgG6@#tXbL1$vI5pra_zbkJ4{dWPqlCVajXo=GWc3JU?e6u@oX92f8x85|vpMufvvlv~*QN@lf*cH7YDbT)"
        "%ZfJT6>^2QTr#!%C-"
        "<fCgUmRtRAg<ZPA6YXd<qhKXKpA671@#bZLUS)Vi$0_05uIr%Q3a6na{M9yih8nyUT;=P*RldRDYXZK`a9YQPpG>U93R"
        "}UMe+QwD%4Smv&Js!@)SDb7@sNItvZcI^w*~GUhIe(mXLNDgiHcb+T1C7cPE^t=McoI%pMU5Z$B7?t^g2Ek#7`JL)$y5"
        "lRBVso^I3e6)a3nRe1yu>hJWZk|Aa4jnpwxWgMV#pZJmuveHVWHLt4dGTGWt9;{?9;ET6-lF?`eTDe5F}Uab9g4d3bb-"
        "an2afAa7{pf=A_$Pm3Y7x;@d%U`sRd@qNk*GO18i-"
        "tW%v9P?<5tdNmVR@i4ERegxLa;k5bP{1szaz|Dd&1nTH_TynhTZutYcMKpFZEGs#v;xBChu?dgy_&mwNCXs)lI6uQ<e5"
        "eQXkcRs;NEk|5+Dp&P<L;b-AIaHl$;I`E9ge&sI?Uj_iMa>6Et14e4S-_@%MFxx+T8KKc(MiEF_"
    )
)
BASE = np.arange(12, dtype=np.float32)
OBJECT = {
    "model": {
        "weight": np.arange(6, dtype=np.float32).reshape(3, 2, 1, 1),
        "bias": np.arange(3, dtype=np.float32),
    },
    "param": np.array([1.5, -2.0], np.float32),
    "view": BASE.reshape(3, 4).T[1:3],
    "base": BASE,
    "bf16": np.array([1.0, 3.140625, -0.0], ml_dtypes.bfloat16),
    "f16": np.array([0.5], np.float16),
    "f64": np.array(1 / 3),
    "i64": np.array([-1, 2**40]),
    "i32": np.array([7], np.int32),
    "i16": np.array([7], np.int16),
    "i8": np.array([-7], np.int8),
    "u8": np.array([200], np.uint8),
    "bool": np.array([True, False]),
    "empty": np.zeros((0, 3), np.float32),
    "expanded": np.ones((2, 3), np.float32),
    "list": [1, 2.5, None, True, "µ", (1, 2), -5, 10**12, {3: "x"}],
    "size": (1, 2),
    "dtype": np.dtype(np.float32),
}


def assert_same(got, want):
    if isinstance(want, dict):
        assert type(got) is dict
        assert list(got) == list(want)
        for name in want:
            assert_same(got[name], want[name])
    elif isinstance(want, np.ndarray):
        assert (got.dtype, got.shape) == (want.dtype, want.shape)
        np.testing.assert_array_equal(np.asarray(got, np.float64), np.asarray(want, np.float64))
    else:
        assert (type(got), got) == (type(want), want)


@pytest.mark.parametrize("data", [ZIP, LEGACY], ids=["zip", "legacy"])
def test_reads_what_torch_wrote(tmp_path, data):
    path = tmp_path / "object.pt"
    path.write_bytes(data)
    assert is_torch_file(path)
    got = load_torch(path)
    assert_same(got, OBJECT)
    assert np.shares_memory(got["view"], got["base"])
    assert not got["base"].flags.writeable


@pytest.mark.parametrize("data", [ZIP, LEGACY], ids=["zip", "legacy"])
def test_every_truncation_is_refused(tmp_path, data):
    path = tmp_path / "cut.pt"
    for n in range(0, len(data) - 1, 7):
        path.write_bytes(data[:n])
        with pytest.raises(ValueError, match="cut.pt is not a PyTorch file that can be read here"):
            load_torch(path)


@pytest.mark.parametrize("data", [ZIP, LEGACY], ids=["zip", "legacy"])
def test_flipped_bytes_give_data_or_a_message(tmp_path, data):
    """Never another exception, a crash, or another type of leaf."""
    path, rng, read = tmp_path / "flipped.pt", np.random.default_rng(0), 0
    for _ in range(300):
        broken = bytearray(data)
        for i in rng.integers(len(data), size=2):
            broken[i] = rng.integers(256)
        path.write_bytes(broken)
        try:
            got = load_torch(path)
        except ValueError:
            continue
        read += 1
        for leaf in got.values():
            assert type(leaf) in {type(leaf) for leaf in OBJECT.values()}
            if isinstance(leaf, np.ndarray) and leaf.size < 10**6:
                np.array(leaf)  # touches all of its memory
    assert 0 < read < 300  # of both kinds


@pytest.mark.parametrize("write", [zipped, legacy])
def test_files_written_by_hand(tmp_path, write):
    path = tmp_path / "hand.pt"
    path.write_bytes(write({"w": tensor(), "square": tensor(size=(2, 2), stride=(1, 2))}))
    got = load_torch(path)
    np.testing.assert_array_equal(got["w"], [0, 1, 2, 3])
    np.testing.assert_array_equal(got["square"], [[0, 2], [1, 3]])


def test_big_endian_storages_are_swapped(tmp_path):
    path = tmp_path / "big.pt"
    records = [("data/0", np.arange(4, dtype=">f4").tobytes()), ("byteorder", b"big")]
    path.write_bytes(zipped(tensor(), records))
    np.testing.assert_array_equal(load_torch(path), [0, 1, 2, 3])


def test_expanded_tensors_take_no_memory(tmp_path):
    path = tmp_path / "wide.pt"
    path.write_bytes(zipped(tensor(size=(10**9, 4), stride=(0, 1))))
    assert load_torch(path).shape == (10**9, 4)


HOSTILE = {
    "os.system": (Call("posix", "system", "touch pwned"), "posix.system, which is not plain data"),
    "subprocess": (Call("subprocess", "check_call", ["touch", "pwned"]), "subprocess.check_call"),
    "eval": (Call("builtins", "eval", "open('pwned','w')"), "builtins.eval"),
    "exec, Python 2": (Call("__builtin__", "exec", "open('pwned','w')"), "__builtin__.exec"),
    "getattr": (Call("builtins", "getattr", Name("torch", "Size"), "__call__"), "builtins.getattr"),
    "nested global": (Call("torch._utils", "os.system", "touch pwned"), "torch._utils.os.system"),
    "dotted name": (b"\x8c\x0btorch._utils\x8c\x0bos.system\x93", "."),
    "a trusted module's helper": (Call("torch._utils", "_import_dotted_name", "os"), "_import_"),
    "numpy's loader": (Call("numpy", "load", "x"), "numpy.load"),
    "storage from bytes": (Call("torch.storage", "_load_from_bytes", "x"), "_load_from_bytes"),
    "a class of its own": (b"cmodels\nUNet\n)\x81", "models.UNet"),
    "opcode INST": (b"(X\x0b\x00\x00\x00touch pwnediposix\nsystem\n", "uses INST"),
    "opcode OBJ": (b"(cposix\nsystem\nX\x0b\x00\x00\x00touch pwnedo", "posix.system"),
    "opcode NEWOBJ": (b"ccollections\nOrderedDict\n)\x81", "uses NEWOBJ"),
    "extension registry": (b"\x82\x01", "uses EXT1"),
    "attributes on a function": (b"ctorch\nSize\n}b", "where none belongs"),
    "call of a value": (b"K\x01)R", "calls what is not a function"),
    "unhashable key": (b"}(}K\x01u", "where none belongs"),
    "deep tuple as a key": (b"}(" + b")" + b"\x85" * 5000 + b"K\x01u", "where none belongs"),
    "empty stack": (b"R", "takes more than it put"),
    "memo never set": (b"h\x07", "KeyError"),
    "wrong arguments": (Call("torch", "Size"), "TypeError"),
    "string of 2**62 bytes": (b"\x8d" + struct.pack("<Q", 2**62), "bytes"),
    "integer of 2 GB": (b"\x8b" + struct.pack("<i", 2**31 - 1) + b"1", "not enough data"),
    "memo index 2**32": (b"Nr\xff\xff\xff\xffh\x00", "KeyError"),
    "storage missing": (tensor(Storage("7")), "'7' is not in the file|its list of storages"),
    "storage elsewhere": (tensor(Storage("../../x")), "../../x' is not|its list of storages"),
    "storage of a name": (tensor(Storage(b"cos\nsystem\n")), "os.system"),
    "huge storage": (tensor(Storage(size=2**60)), "has 16 bytes, not|more bytes than"),
    "negative storage": (tensor(Storage(size=-4)), "negative size"),
    "outside": (tensor(offset=1), "outside of its storage"),
    "before": (tensor(offset=-1), "outside of its storage"),
    "backwards": (tensor(offset=3, stride=(-1,)), "outside of its storage"),
    "stride that overflows": (tensor(size=(5,), stride=(2**60,)), "outside of its storage"),
    "too big": (tensor(size=(2**40, 2**40), stride=(0, 0)), "too big|too large|Maximum"),
    "strides missing": (tensor(stride=()), "argument"),
    "tensor of no storage": (tensor(b"K\x05"), "where none belongs"),
    "counter of a call": (Call("collections", "Counter", "abc"), "where none belongs"),
    "set of a string": (Call("builtins", "set", "abc"), "where none belongs"),
    "type of objects": (Call("numpy", "dtype", "O8", False, True), "'O8', which is no number"),
    "scalar of a storage": (
        Call("numpy._core.multiarray", "scalar", Name("torch", "FloatStorage"), "x"),
        "where none belongs",
    ),
    "scalar of many bytes": (
        Call(
            "numpy.core.multiarray",
            "scalar",
            Call("numpy", "dtype", "f4"),
            Call("_codecs", "encode", "x" * 8, "latin1"),
        ),
        "too many values",
    ),
    "the other byte order": (
        dumps(Call("numpy", "dtype", "f4")) + dumps((3, ">", None)) + b"b",
        "other byte order",
    ),
    "codec": (Call("_codecs", "encode", "x", "rot13"), "bytes in 'rot13'"),
    "device of a dict": (Call("torch", "device", {}), "where none belongs"),
    "a module": (b"(X\x06\x00\x00\x00modulectorch\nSize\nX\x01\x00\x00\x000K\x01K\x01tQ", "plain"),
}


@pytest.mark.parametrize("write", [zipped, legacy])
@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_pickles_are_refused_and_nothing_runs(tmp_path, monkeypatch, write, what):
    monkeypatch.chdir(tmp_path)
    for module, name in [(os, "system"), (subprocess, "Popen"), (os, "posix_spawn")]:
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("the payload ran"))
    value, says = HOSTILE[what]
    (tmp_path / "bad.pt").write_bytes(write(value))
    with pytest.raises(ValueError, match=f"bad.pt is not a PyTorch file .*({says})"):
        load_torch("bad.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["bad.pt"]


def test_the_payloads_do_run_in_pickle(tmp_path, monkeypatch):
    """So that the test above can fail."""
    monkeypatch.chdir(tmp_path)
    pickle.loads(b"\x80\x02" + dumps(HOSTILE["os.system"][0]) + b".")
    assert (tmp_path / "pwned").exists()


W = {"w": tensor()}
RECORD = ("data/0", FOUR)
BAD_FILES = {
    "empty": (b"", "begins like neither"),
    "text": (b"weights: none", "begins like neither"),
    "plain pickle": (pickle.dumps(OrderedDict(a=1)), "begins like neither"),
    "NumPy archive": (zipped(W).replace(b"data.pkl", b"data.npy"), "0 records data.pkl"),
    "compressed": (zipped(W, compression=zipfile.ZIP_DEFLATED), "compressed or encrypted"),
    "zip bomb": (
        zipped(W, [("data/0", bytes(10**6))], compression=zipfile.ZIP_LZMA),
        "compressed or encrypted",
    ),
    "TorchScript": (zipped(W, [RECORD, ("constants.pkl", b"")]), "TorchScript"),
    "two pickles": (zipped(W, [RECORD, ("b/data.pkl", b"")]), "2 records data.pkl"),
    "short record": (zipped(W, [("data/0", FOUR[:8])]), "has 8 bytes, not 16"),
    "long record": (zipped(W, [("data/0", FOUR * 2)]), "has 32 bytes, not 16"),
    "changed record": (zipped(W).replace(FOUR, FOUR[::-1]), "CRC"),
    "other version": (legacy(W).replace(pickle.dumps(1001, 2), pickle.dumps(7, 2)), "version 1001"),
    "no storages": (legacy(W, tail=b""), "another size"),
    "short storages": (legacy(W, tail=struct.pack("<q", 4) + FOUR[:8]), "broadcast"),
    "other storages": (legacy(W, keys=("1",)), "list of storages"),
    "storages twice": (legacy(W, keys=("0", "0")), "list of storages"),
    "keys of tuples": (legacy(W, keys=((),)), "where none belongs"),
    "two sizes": (legacy((tensor(), tensor(Storage(size=2), size=(2,)))), "two sizes"),
    "other count": (legacy(W, tail=struct.pack("<q", 2**61) + FOUR), "another size"),
}


@pytest.mark.parametrize("what", BAD_FILES)
def test_bad_files_are_refused(tmp_path, what):
    data, says = BAD_FILES[what]
    (tmp_path / "bad.pt").write_bytes(data)
    with pytest.raises(ValueError, match=f"bad.pt is not a PyTorch file .*({says})"):
        load_torch(tmp_path / "bad.pt")


def test_two_records_of_one_name_are_refused(tmp_path):
    with pytest.warns(UserWarning, match="Duplicate name"):
        data = zipped(W, [RECORD, RECORD])
    (tmp_path / "bad.pt").write_bytes(data)
    with pytest.raises(ValueError, match="two records of one name"):
        load_torch(tmp_path / "bad.pt")


def test_overlapping_records_are_refused(tmp_path):
    """200 records, each within the one before: 4 MB of tensors from 50 kB (Fifield 2019)."""
    data, infos, sizes = bytes(2**14), [], {}
    for i in range(200):
        info = zipfile.ZipInfo(f"a/data/{i}")
        info.file_size = info.compress_size = sizes[i] = len(data)
        info.CRC = zlib.crc32(data)
        data = info.FileHeader() + data
        info.header_offset = len(data)  # from the end, as yet
        infos.append(info)
    for info in infos:
        info.header_offset = len(data) - info.header_offset
    value = {str(i): tensor(Storage(str(i), n, "ByteStorage"), size=(n,)) for i, n in sizes.items()}
    file = io.BytesIO(data)
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02" + dumps(value) + b".")
        archive.filelist += infos
    (tmp_path / "bad.pt").write_bytes(file.getvalue())
    with pytest.raises(ValueError, match="(?i)overlap"):
        load_torch(tmp_path / "bad.pt")


def test_shared_structures_stay_shared(tmp_path):
    """Ten lists of ten times the list before: 10**40 elements, if they were copied."""
    lists = (b"](" + (b"h" + bytes([i])) * 10 + b"eq" + bytes([i + 1]) for i in range(40))
    path = tmp_path / "laughs.pt"
    path.write_bytes(zipped(b"](" + b"]q\x00" + b"".join(lists) + b"e", []))
    got = load_torch(path)
    assert len(got) == 41
    assert all(part is got[39] for part in got[40])


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint file"):
        load_torch(tmp_path / "none.pt")
    with pytest.raises(FileNotFoundError, match="no checkpoint file"):
        load_torch(tmp_path)
