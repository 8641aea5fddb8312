"""Decoding any image to the picture a person would see, and finding image files."""

import contextlib
import importlib.util
import io
import logging
import os
import struct
import sys
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from inarch.core.errors import DataError, InarchError
from inarch.data import extras, images
from inarch.data.images import EncodedImage, find_images, open_image, source_name, unreadable


def noise(*shape, dtype=np.uint8, high=256):
    """Random pixels."""
    return np.random.default_rng(0).integers(0, high, shape, dtype=dtype)


def encoded(image, kind="PNG", **options):
    """The bytes of an image file."""
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def pixels(source):
    """What `open_image` makes of a source, as an array."""
    image = open_image(source)
    assert image.mode == "RGB"
    return np.asarray(image)


def on_white(colour, alpha):
    """The formula for a colour that covers white by `alpha` of 255."""
    return np.rint((colour.astype(float) * alpha + 255.0 * (255 - alpha)) / 255)


def test_every_way_to_name_an_image_gives_the_same_pixels(tmp_path):
    """A path, its text, bytes, named bytes, an open image and an array are all the same picture."""
    wanted = noise(5, 7, 3)
    path = tmp_path / "a.png"
    Image.fromarray(wanted).save(path)
    data = path.read_bytes()
    for source in (path, str(path), data, EncodedImage(data, "x"), Image.fromarray(wanted), wanted):
        assert np.array_equal(pixels(source), wanted)


@pytest.mark.parametrize("mode", ["L", "1"])
def test_grey_is_the_same_in_all_channels(mode):
    """Grey and 1-bit images become RGB with three equal channels."""
    grey = Image.fromarray(noise(6, 5)).convert(mode)
    got = pixels(encoded(grey))
    assert np.array_equal(got, np.asarray(grey.convert("L"))[..., None].repeat(3, axis=2))


def test_transparency_is_laid_on_white():
    """RGBA and LA follow the formula of compositing, to within one level of rounding."""
    rgba = noise(6, 5, 4)
    wanted = on_white(rgba[..., :3], rgba[..., 3:].astype(float))
    assert np.abs(pixels(encoded(Image.fromarray(rgba))).astype(float) - wanted).max() <= 1
    grey_alpha = Image.merge("LA", [Image.fromarray(rgba[..., channel].copy()) for channel in (0, 3)])
    wanted = on_white(rgba[..., :1], rgba[..., 3:].astype(float)).repeat(3, axis=2)
    assert np.abs(pixels(encoded(grey_alpha)).astype(float) - wanted).max() <= 1


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_a_transparent_palette_entry_is_white(kind):
    """A palette's transparent colour shows as white, its other colours as they are."""
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    got = pixels(encoded(image, kind, transparency=0))
    assert got.tolist() == [[[255, 255, 255], [200, 100, 50]]]


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_transparent_colour_is_white(mode):
    """One colour of an image without alpha can be transparent too."""
    image = Image.new(mode, (2, 1), 0 if mode == "L" else (0, 0, 0))
    image.putpixel((1, 0), 77 if mode == "L" else (77, 77, 77))
    got = pixels(encoded(image, transparency=0 if mode == "L" else (0, 0, 0)))
    assert got.tolist() == [[[255] * 3, [77] * 3]]


@pytest.mark.parametrize(("kind", "suffix"), [("PNG", "png"), ("TIFF", "tif"), ("PPM", "pgm")])
def test_16_bit_grey_is_scaled_not_clipped(kind, suffix, tmp_path):
    """All 65,536 levels map to 256 in proportion, whichever format holds them."""
    deep = np.linspace(0, 65535, 256, dtype=np.uint16).reshape(16, 16)
    path = tmp_path / f"deep.{suffix}"
    Image.fromarray(deep).save(path, kind)
    assert np.array_equal(pixels(path)[..., 0], np.rint(deep / 257).astype(np.uint8))


def test_a_dark_16_bit_scan_stays_dark():
    """The depth is that of the file, not of the image: 255 of 65,535 is nearly black."""
    dark = np.full((4, 4), 255, dtype=np.uint16)
    assert pixels(encoded(Image.fromarray(dark))).max() == 1
    assert pixels(encoded(Image.fromarray(dark), "PPM")).max() == 1


def test_big_endian_16_bit_is_read_as_such():
    """The order of bytes in a TIFF changes nothing."""
    deep = np.array([[0, 1000, 65535]], dtype=np.uint16)
    image = Image.frombytes("I;16B", (3, 1), deep.astype(">u2").tobytes())
    assert pixels(encoded(image, "TIFF"))[0, :, 0].tolist() == [0, 4, 255]


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ([0, 100, 255], [0, 100, 255]),  # fits 8 bits
        ([0, 25700, 65535], [0, 100, 255]),  # fits 16
        ([-100, 0, 100], [0, 128, 255]),  # its own range
        ([0, 1_000_000, 2_000_000], [0, 128, 255]),
        ([-5, -5, -5], [0, 0, 0]),
    ],
)
def test_32_bit_integers_are_scaled_to_the_range_that_holds_them(values, wanted):
    """No 32-bit image is clipped: it has 8 or 16 bits, or is stretched."""
    assert pixels(encoded(Image.fromarray(np.array([values], dtype=np.int32)), "TIFF"))[0, :, 0].tolist() == wanted


@pytest.mark.parametrize(
    ("values", "wanted"),
    [([0.0, 0.5, 1.0], [0, 128, 255]), ([0.0, 0.2, 0.4], [0, 51, 102]), ([-1.0, 0.0, 3.0], [0, 64, 255])],
)
def test_floats_are_a_share_of_white_or_stretched(values, wanted):
    """A float TIFF in 0 to 1 is taken as it is, any other by its own range."""
    assert pixels(encoded(Image.fromarray(np.array([values], dtype=np.float32)), "TIFF"))[0, :, 0].tolist() == wanted


def test_a_float_that_is_no_number_is_refused():
    """NaN has no brightness."""
    image = Image.fromarray(np.array([[0.0, np.nan]], dtype=np.float32))
    with pytest.raises(DataError, match="got `a pixel that is not a finite number` at `scan 3`"):
        open_image(EncodedImage(encoded(image, "TIFF"), "scan 3"))


def test_cmyk_is_converted():
    """CMYK becomes what PIL's conversion makes of it."""
    image = Image.frombytes("CMYK", (8, 8), noise(256).tobytes())
    assert np.array_equal(pixels(encoded(image, "TIFF")), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
def test_the_camera_rotation_is_applied(orientation, kind):
    """Each of the eight orientations shows upright, and an image that PIL has opened is not changed by it."""
    upright = Image.new("L", (24, 16), 0)
    upright.paste(255, (0, 0, 12, 8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = upright.transpose(
        {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
         5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
         8: Image.Transpose.ROTATE_270}[orientation]
    ) if orientation > 1 else upright  # fmt: skip
    data = encoded(stored, kind, exif=exif)
    assert np.abs(pixels(data)[..., 0].astype(int) - np.asarray(upright)).max() < 40  # JPEG rings at the edge
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        size = image.size
        open_image(image)
        assert image.size == size


def test_the_first_frame_of_an_animation_is_taken():
    """An animated GIF is its first picture."""
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((250, 0, 0), (0, 250, 0))]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert pixels(data)[0, 0].tolist() == [250, 0, 0]


@given(
    st.integers(1, 9),
    st.integers(1, 9),
    st.sampled_from(["1", "L", "LA", "P", "RGB", "RGBA", "I;16", "I", "F", "CMYK"]),
)
def test_any_mode_and_size_becomes_rgb_of_that_size(width, height, mode):
    """Nothing but the mode changes."""
    assert open_image(Image.new(mode, (width, height))).size == (width, height)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_a_truncated_image_is_refused_by_name(kind, share, tmp_path):
    """Half a file is never half a picture."""
    path = tmp_path / f"cut.{kind.lower()}"
    data = encoded(Image.fromarray(noise(64, 64, 3)), kind)
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(DataError, match=r"An image must be whole and readable; got .* at `.*cut\.[a-z]+`. Mend or"):
        open_image(path)


def test_a_file_that_is_no_image_is_refused(tmp_path):
    """The message names the formats that are read."""
    path = tmp_path / "a.png"
    path.write_text("hello")
    with pytest.raises(DataError, match=r"got a file that is none of PNG, JPEG, .* at `.*a\.png`"):
        open_image(path)
    path.write_bytes(b"")
    with pytest.raises(DataError, match="got a file that is none of"):
        open_image(path)


def test_a_format_that_runs_a_program_is_refused(tmp_path):
    """PostScript is not handed to an interpreter."""
    path = tmp_path / "a.png"
    Image.new("RGB", (4, 4)).save(path, "EPS")
    with pytest.raises(DataError, match="got a file that is none of"):
        open_image(path)


def test_a_missing_file_is_refused(tmp_path):
    """A path with nothing there is named."""
    with pytest.raises(DataError, match="got no file at `.*nowhere.png`"):
        open_image(tmp_path / "nowhere.png")


def bomb(width, height):
    """A PNG that claims a size and holds nothing."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in ((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b""))
    )
    return b"\x89PNG\r\n\x1a\n" + chunks


def test_a_decompression_bomb_is_refused():
    """A few bytes that claim billions of pixels are not decoded."""
    with pytest.raises(DataError, match=r"got a decompression bomb \(Image size \(10000000000 pixels\).* at `bomb`"):
        open_image(EncodedImage(bomb(100_000, 100_000), "bomb"))


def test_an_error_has_no_chain_of_others(tmp_path):
    """The message is the whole story: no traceback of PIL's precedes it."""
    with pytest.raises(DataError) as caught:
        open_image(tmp_path / "nowhere.png")
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None


def test_the_names_of_sources():
    """What is not a file has a name too."""
    sources = [b"", noise(1, 1, 3), Image.new("L", (1, 1)), EncodedImage(b"", "row 3")]
    assert [source_name(source) for source in sources] == [
        "bytes in memory", "pixels in memory", "an image in memory", "row 3"
    ]  # fmt: skip


def test_only_decoding_finds_a_truncated_jpeg(tmp_path):
    """The thorough examination finds what the headers hide, and both name every bad file."""
    good, cut, text = (tmp_path / name for name in ("good.jpg", "cut.jpg", "text.jpg"))
    data = encoded(Image.fromarray(noise(64, 64, 3)), "JPEG")
    good.write_bytes(data)
    cut.write_bytes(data[:-500])
    text.write_text("no image")
    assert list(unreadable([good, cut, text], thorough=False)) == [2]
    faults = unreadable([good, cut, text], thorough=True)
    assert list(faults) == [1, 2]
    assert f"at `{cut}`" in faults[1]


@pytest.mark.parametrize("progressive", [True, False])
@given(st.integers(1, 3000))
def test_a_cut_that_is_found_at_use_is_found_before(progressive, cut):
    """The quick decoding of the examination misses no truncation, and gives the same words."""
    data = encoded(Image.fromarray(noise(64, 64, 3)), "JPEG", progressive=progressive)[:-cut]
    faults = unreadable([EncodedImage(data, "x")], thorough=True)
    with pytest.raises(DataError) if faults else contextlib.nullcontext() as caught:
        open_image(EncodedImage(data, "x"))
    assert caught is None or faults[0] in str(caught.value)


def tree(root, *names):
    """Tiny images at the given places."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2, 2)).save(root / name)


def test_images_are_found_below_folders_in_order(tmp_path, caplog):
    """Folders are searched all through and sorted; hidden files and others are left, the latter with a note."""
    caplog.set_level(logging.INFO)
    tree(tmp_path, "b/2.png", "b/1.PNG", "a/x/3.jpeg", ".hidden/4.png", "a/.5.png")
    (tmp_path / "notes.txt").write_text("")
    found = find_images([tmp_path])
    assert [str(path.relative_to(tmp_path)) for path in found] == ["a/x/3.jpeg", "b/1.PNG", "b/2.png"]
    assert "notes.txt" in caplog.text
    assert "hidden" not in caplog.text


def test_a_named_file_is_taken_whatever_its_suffix(tmp_path):
    """The order of the arguments stays, and an image named twice is one image."""
    tree(tmp_path, "b.png", "a.png")
    (tmp_path / "c").write_bytes((tmp_path / "a.png").read_bytes())
    paths = [tmp_path / "c", tmp_path / "b.png", tmp_path]
    assert [path.name for path in find_images(paths)] == ["c", "b.png", "a.png"]


def test_a_link_back_up_is_not_followed(tmp_path, caplog):
    """A folder that links to its parent does not make an endless list."""
    caplog.set_level(logging.INFO)
    tree(tmp_path, "a/1.png")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    assert len(find_images([tmp_path])) == 1
    assert "a linked folder" in caplog.text


def test_what_is_missing_is_refused_or_announced(tmp_path, caplog):
    """Every path that yields nothing is named; with `skip_bad` they are left out unless nothing remains."""
    tree(tmp_path, "a.png")
    (tmp_path / "empty").mkdir()
    paths = [tmp_path / "a.png", tmp_path / "none", tmp_path / "empty"]
    with pytest.raises(DataError, match="got nothing at `.*none`, a folder without images at `.*empty`. Images end in"):
        find_images(paths)
    assert find_images(paths, skip_bad=True) == [tmp_path / "a.png"]
    assert "none" in caplog.text
    with pytest.raises(DataError, match="a folder with images; got nothing at"):
        find_images(paths[1:], skip_bad=True)
    with pytest.raises(DataError, match="At least one image is needed; got no path"):
        find_images([])


def test_a_long_list_of_missing_paths_is_counted(tmp_path):
    """Ten are named, the others counted."""
    with pytest.raises(DataError, match="and 5 more. Images end in"):
        find_images([tmp_path / str(number) for number in range(15)])


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is closed to root")
def test_a_closed_folder_is_refused(tmp_path):
    """Images in a folder that cannot be read are not silently missing."""
    tree(tmp_path, "shut/1.png")
    (tmp_path / "shut").chmod(0)
    with pytest.raises(DataError, match="A folder must be readable; got `Permission denied` at `.*shut`"):
        find_images([tmp_path])


def test_a_missing_package_is_named_with_the_line_that_installs_it(monkeypatch):
    """Without the extra, the message is the command to run."""
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(InarchError, match=r'needs the optional package `sklearn`.*`pip install "inarch\[train\]"`'):
        extras.extra("sklearn")


def test_without_pil_the_message_is_the_command_to_run(monkeypatch):
    """Importing the decoder says what to install."""
    spec = importlib.util.spec_from_file_location("inarch.data.images_again", images.__file__)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(InarchError, match=r'optional package `PIL`.*`pip install "inarch\[train\]"`'):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning")
def test_broken_exif_does_not_hide_an_image():
    """An image whose camera data are damaged is shown as it is stored."""
    image = Image.fromarray(noise(16, 16, 3))
    for exif in (
        b"Exif\x00\x00garbage",
        b"Exif\x00\x00MM\x00*\xff\xff\xff\xff",
        b"Exif\x00\x00II*\x00\x08\x00\x00\x00\x05\x00",
    ):
        assert pixels(encoded(image, "JPEG", exif=exif)).shape == (16, 16, 3)


def test_an_orientation_is_read_whatever_else_is_damaged(caplog):
    """A bad description does not cost the rotation, and unreadable data cost nothing but the rotation."""
    caplog.set_level(logging.INFO)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    data = exif.tobytes()
    image = Image.fromarray(noise(8, 16, 3))
    assert pixels(encoded(image, "JPEG", exif=data.replace(b"a descr", b"\xff" * 7))).shape == (16, 8, 3)
    assert pixels(encoded(image, "PNG", exif=b"Exif\x00\x00garbage")).shape == (8, 16, 3)
    assert "cannot be read" in caplog.text
