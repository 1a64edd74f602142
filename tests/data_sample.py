"""A small genuine corpus for tests: drawn pictures and typed poems through the real build, offline."""

import io
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from training.data import corpus
from training.data.build import build_corpus
from training.data.features import EfficientNetLite0
from training.data.pictures import normalised_png
from training.data.rows import Log, Picture, Text
from training.data.splits import split_of

_COLOURS = {
    "红": ("red", "#d33"),
    "蓝": ("blue", "#36c"),
    "绿": ("green", "#2a4"),
    "黄": ("yellow", "#ec3"),
    "黑": ("black", "#222"),
}
_SHAPES = {
    "圆": "circle",
    "方块": "square",
    "三角": "triangle",
    "十字": "cross",
    "圆环": "ring",
    "菱形": "diamond",
}

# Public-domain verse; each line of a couplet is combined with others into many short poems.
_COUPLETS = """
床前明月光 疑是地上霜
春眠不觉晓 处处闻啼鸟
白日依山尽 黄河入海流
红豆生南国 春来发几枝
千山鸟飞绝 万径人踪灭
空山不见人 但闻人语响
松下问童子 言师采药去
独坐幽篁里 弹琴复长啸
移舟泊烟渚 日暮客愁新
君自故乡来 应知故乡事
山中相送罢 日暮掩柴扉
终南阴岭秀 积雪浮云端
日暮苍山远 天寒白屋贫
寥落古行宫 宫花寂寞红
向晚意不适 驱车登古原
"""
_FIRST, _SECOND = _COUPLETS.split()[::2], _COUPLETS.split()[1::2]
_THINGS = ["这本书", "这家酒店", "这台电脑", "房间", "屏幕", "早餐", "封面", "键盘", "服务", "包装"]
_GOOD = ["很不错", "非常满意", "值得推荐", "让人喜欢", "比想象的好"]
_BAD = ["太差了", "让人失望", "不值这个价", "问题很多", "以后不会再来"]


def draw(shape: str, colour: str, fill: float = 0.8, side: int = 96) -> bytes:
    """PNG of one shape on a white square of `side` pixels; the shape takes the share `fill` of the side."""
    image = Image.new("RGB", (side, side), "white")
    pen = ImageDraw.Draw(image)
    middle, arm = side // 2, side // 12
    low, high = round(side * (1 - fill) / 2), round(side * (1 + fill) / 2)
    box = (low, low, high, high)
    if shape == "circle":
        pen.ellipse(box, fill=colour)
    elif shape == "square":
        pen.rectangle(box, fill=colour)
    elif shape == "triangle":
        pen.polygon([(middle, low), (high, high), (low, high)], fill=colour)
    elif shape == "cross":
        pen.rectangle((middle - arm, low, middle + arm, high), fill=colour)
        pen.rectangle((low, middle - arm, high, middle + arm), fill=colour)
    elif shape == "ring":
        pen.ellipse(box, outline=colour, width=arm)
    else:
        pen.polygon([(middle, low), (high, middle), (middle, high), (low, middle)], fill=colour)
    out = io.BytesIO()
    image.save(out, format="PNG")
    return out.getvalue()


def sample_pictures() -> list[Picture]:
    """90 pictures of 60 families: six shapes in five colours and two sizes, the small ones in two styles."""
    return [
        _picture(style, size, colour, shape)
        for style, sizes in (("fluent-3d", "大小"), ("noto", "小"))
        for size in sizes
        for colour in _COLOURS
        for shape in _SHAPES
    ]


def _picture(style: str, size: str, colour: str, shape: str) -> Picture:
    family = f"{size}{colour}{shape}"
    english, rgb = _COLOURS[colour]
    return Picture(
        id=f"{style}/{family}",
        source="A" if style == "fluent-3d" else "C",
        licence="CC0-1.0",
        family=family,
        split=split_of(family),
        style=style,
        zh=f"{size}{colour}色{shape}",
        tags=[f"{colour}色", shape, "图形"],
        en=f"{'big' if size == '大' else 'small'} {english} {_SHAPES[shape]}",
        group="图形",
        subgroup=shape,
        mirrorable=True,
        image=normalised_png(
            draw(_SHAPES[shape], rgb, 0.8 if size == "大" else 0.4, 96 if style == "fluent-3d" else 64)
        ),
    )


def sample_texts() -> list[Text]:
    """225 poems of two lines and 100 reviews."""
    poems = [_poem(i, j) for i in range(len(_FIRST)) for j in range(len(_SECOND))]
    reviews = [
        _review(thing, opinion, polarity)
        for polarity, opinions in (("好评", _GOOD), ("差评", _BAD))
        for thing in _THINGS
        for opinion in opinions
    ]
    return poems + reviews


def _poem(i: int, j: int) -> Text:
    title = f"{_FIRST[i][:2]}{_SECOND[j][-2:]}"
    return Text(
        id=f"T1/{i}-{j}",
        source="T1",
        licence="public domain",
        split=split_of(title),
        kind="poem",
        text=f"{_FIRST[i]}，{_SECOND[j]}。\n{_FIRST[(i + j) % 15]}，{_SECOND[(2 * i + j) % 15]}。",
        form="诗",
        title=title,
        author="佚名",
    )


def _review(thing: str, opinion: str, polarity: str) -> Text:
    text = f"{thing}{opinion}，下次{'还会' if polarity == '好评' else '不'}买。"
    return Text(
        id=f"T2/{text}",
        source="T2",
        licence="CC0-1.0",
        split=split_of(text),
        kind="review",
        text=text,
        polarity=polarity,
        topic="商品",
    )


def random_network(seed: int = 0) -> EfficientNetLite0:
    """An untrained feature network whose features nevertheless tell pictures apart.

    One pass over noise sets the batch statistics: with the initial ones the signal dies out on its way down.
    """
    generator = torch.Generator().manual_seed(seed)
    network = EfficientNetLite0()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() > 1:
                fan_in = parameter[0].numel()
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * (2 / fan_in) ** 0.5)
        network.fc.bias.zero_()
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = None
        network.train().features(torch.randn(32, 3, 64, 64, generator=generator))
    return network.eval()


def build_sample(data_dir: Path, vocab_size: int = 540) -> corpus.Corpus:
    """Build the sample under `data_dir` and open it."""
    folder = data_dir / corpus.FOLDER
    folder.mkdir(parents=True)
    build_corpus(folder, sample_pictures(), sample_texts(), random_network(), {}, Log(), vocab_size)
    return corpus.Corpus.open(data_dir)
