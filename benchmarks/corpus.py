"""Chat data for the benchmarks, made on the spot: the same arguments give the same bytes.

The words are invented from morphemes and drawn with a Zipf-like frequency, so a tokenizer meets rare words
as often as in real chats. Between them stand numbers, punctuation, lists, code and Chinese.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

# ---- words --------------------------------------------------------------------------------------

COMMON = """
the of and to a in is that it for was on are as with be at one have this from or by not but what all were when we
there can an your which their said if do will each about how up out them then she many some so these would other into
has more her two like him see time could no make than first been its who now people my made over did down only way
find use may water long little very after words called just where most know get through back much before go good new
write our used me man too any day same right look think also around another came come work three word must because
does part even place well such here take why things help put years different away again off went old number great
tell men say small every found still between name should home big give air line set own under read last never us left
end along while might next sound below saw something thought both few those always looked show large often together
asked house don't world going want school important until form food keep children feet land side without boy once
animals life enough took sometimes four head above kind began almost live page got earth need far hand high year
mother light parts country father let night following picture being study second eyes soon times story boys since
white days ever paper hard near sentence better best across during today others however sure means knew it's try told
young miles sun ways thing whole hear example heard several change answer room sea against top turned learn point
city play toward five using himself usually money seen didn't car morning given I I'm you're can't isn't function
value list file code data error model system user return type string object class method server request test
""".split()
PREFIXES = "re un in de pre dis con trans inter over sub super co ex en pro multi micro non auto".split() + [""] * 20
ROOTS = """
act art band bas bell bord brand cap carr cent cert char clam class cod comp cord cre cult cur dat dens dict doc dom
draft duct elect equ fab fact fer fict fin firm flect flor form found fract frag fund gen gest grad graph grav ground
hab harm host ident imag insul ject join just lab land lat lect legis liber lign lim line loc log lumin magn man mark
mater med mem ment merg meter migr min mod mon mort mot nav neg norm not nov numer opt ord org pact part pass path
pend pet phon phys plac plan plant ply point polar pop port pos prim priv prob prov publ quant quer quest rad ration
reg rend rot rupt sampl scal scan scop scrib sect sens sequ serv sign simil sist sol son spec spher spir stabil stat
stor struct suad summ surf tact tang temp tend terr test text therm tin tract trad trib tru turb typ urb util vac val
var vent verb vers vid vis vit voc volt volv
""".split()
SUFFIXES = """
s ed ing er ers ion ions ive al ally able ment ments ance ence ate ated ating ator ity ities ous ously ic ical ically
ism ist ists ize ized izing ization ful less ness y ly ary ory ure ures age ant ent ible ably ation ations
""".split()
NUM_WORDS = 50_000
ZIPF = 1.15

CHINESE = """
我们 可以 使用 这个 方法 问题 需要 数据 模型 结果 首先 然后 因此 如果 那么 时间 系统 函数 计算 信息 方式 不同
进行 实现 通过 对于 例如 以及 其中 主要 重要 情况 发展 研究 技术 学习 训练 语言 文本 用户 服务 网络 安全 环境
经济 社会 文化 历史 今天 明天 天气 城市 生活 工作 公司 产品 市场 价格 分析 说明 请问 谢谢 帮助 回答 解释 步骤
代码 运行 错误 检查 文件 输入 输出 变量 循环 条件 数组 字符串 的 了 是 在 和 有
""".split()
CODE = (
    "def {a}_{b}({c}, limit={n}):\n    if not {c}:\n        return None\n    return [x.{a}() for x in {c}[:limit]]\n",
    'for i in range({n}):\n    {a}[i] = {b}(i, {c}=True)  # {c}\n    print(f"{{i}}: {{{a}[i]!r}}")\n',
    "const {a} = await fetch(`/api/{b}/${{{c}}}?page={n}`);\nif (!{a}.ok) {{ throw new Error('{b}'); }}\n",
    "SELECT {a}, COUNT(*) AS n\nFROM {b}\nWHERE {c} > {n}\nGROUP BY {a}\nORDER BY n DESC;\n",
    '{{\n  "{a}": {n},\n  "{b}": ["{c}", null, true],\n  "path": "/usr/share/{a}/{b}.json"\n}}\n',
)


class Writer:
    """Writes text of words, from one seed.

    Args:
        seed: what the text depends on.
    """

    def __init__(self, seed: int):
        self.rng = np.random.default_rng(seed)
        self.words = np.array(COMMON + invented_words(NUM_WORDS - len(COMMON)))
        weights = 1 / (np.arange(len(self.words)) + 2.7) ** ZIPF
        self.frequencies = np.cumsum(weights / weights.sum())
        self._waiting: list[str] = []

    def some_words(self, count: int) -> list[str]:
        """The next words."""
        if len(self._waiting) < count:
            places = np.searchsorted(self.frequencies, self.rng.random(1 << 16))
            self._waiting += self.words[np.minimum(places, len(self.words) - 1)].tolist()
        taken = self._waiting[-count:]
        del self._waiting[-count:]
        return taken

    def sentence(self) -> str:
        words = self.some_words(int(self.rng.integers(5, 22)))
        draw = self.rng.random(3)
        if draw[0] < 0.5:
            words[len(words) // 2] += ","
        if draw[1] < 0.15:
            words[-1] = f"{self.rng.integers(1, 5000) / 10}"
        elif draw[1] < 0.2:
            words[-2] = f"({words[-2]} {self.rng.integers(1900, 2030)})"
        words[0] = words[0].capitalize()
        return " ".join(words) + ("?" if draw[2] < 0.1 else "." if draw[2] < 0.93 else "!")

    def code(self) -> str:
        a, b, c = (word.strip("'").lower().replace("'", "") for word in self.some_words(3))
        return CODE[self.rng.integers(len(CODE))].format(a=a, b=b, c=c, n=self.rng.integers(2, 500))

    def chinese(self) -> str:
        words = [CHINESE[i] for i in self.rng.integers(len(CHINESE), size=self.rng.integers(6, 18))]
        return "".join(words[: len(words) // 2]) + "，" + "".join(words[len(words) // 2 :]) + "。"

    def text(self, num_words: int) -> str:
        """Paragraphs of about so many words, now and then with a list, code or Chinese."""
        parts: list[str] = []
        while num_words > 0:
            draw = self.rng.random()
            if draw < 0.05:
                part = "```\n" + self.code() + "```"
            elif draw < 0.1:
                part = self.chinese()
            elif draw < 0.18:
                items = [" ".join(self.some_words(4)) for _ in range(self.rng.integers(2, 5))]
                part = "\n".join(f"{i}. **{item}**" for i, item in enumerate(items, 1))
            else:
                part = " ".join(self.sentence() for _ in range(self.rng.integers(1, 5)))
            parts.append(part)
            num_words -= max(part.count(" "), 8)
        return "\n\n".join(parts)

    def conversation(self) -> list[dict[str, str]]:
        """One to five questions with their answers; half of them after a system prompt of their own."""
        messages = []
        if self.rng.random() < 0.5:
            messages.append({"role": "system", "content": self.sentence()})
        for _ in range(self.rng.integers(1, 6)):
            messages.append({"role": "user", "content": self.text(int(self.rng.integers(5, 35)))})
            messages.append({"role": "assistant", "content": self.text(int(self.rng.integers(20, 105)))})
        return messages


def invented_words(count: int) -> list[str]:
    """Different plausible words, the shorter ones rather first, as in languages."""
    rng = np.random.default_rng(0)
    found = dict.fromkeys(ROOTS)
    while len(found) < 2 * count:
        drawn = zip(*(rng.choice(some, size=count).tolist() for some in (PREFIXES, ROOTS, SUFFIXES)), strict=True)
        found.update(dict.fromkeys(map("".join, drawn)))
    words = list(found)[:count]
    return sorted(words, key=lambda word: len(word) + 6 * rng.random())


# ---- files --------------------------------------------------------------------------------------


def conversations(num_rows: int, seed: int = 0, system_words: int = 0) -> Iterator[list[dict[str, str]]]:
    """Conversations of about 600 tokens.

    Args:
        system_words: all rows begin with the same system prompt of about so many words; 0: see Writer.
    """
    writer = Writer(seed)
    system = {"role": "system", "content": writer.text(system_words)} if system_words else None
    for _ in range(num_rows):
        messages = writer.conversation()
        if system is not None:
            messages = [system, *(m for m in messages if m["role"] != "system")]
        yield messages


def write_jsonl(path: Path, rows: Iterator[list[dict[str, str]]]) -> None:
    """Writes one {"messages": …} on each line."""
    with open(path, "w", encoding="utf-8") as file:
        for messages in rows:
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
