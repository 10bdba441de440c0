"""Generate the example conversations in examples/data/: small, original, in English and Chinese, always the same.

    python examples/make_example_data.py examples/data

The four files differ on purpose, to show what the loader accepts: JSON lines and a JSON array, a system prompt,
several turns, tool calls, reasoning, and columns (id, meta) whose types clash between files.
"""

import argparse
import json
from pathlib import Path
from typing import Any

CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Portugal": "Lisbon",
    "Austria": "Vienna", "Hungary": "Budapest", "Poland": "Warsaw", "Norway": "Oslo", "Sweden": "Stockholm",
    "Finland": "Helsinki", "Denmark": "Copenhagen", "Greece": "Athens", "Ireland": "Dublin", "Iceland": "Reykjavik",
    "Japan": "Tokyo", "China": "Beijing", "India": "New Delhi", "Thailand": "Bangkok", "Vietnam": "Hanoi",
    "Indonesia": "Jakarta", "Mongolia": "Ulaanbaatar", "Nepal": "Kathmandu", "Egypt": "Cairo", "Kenya": "Nairobi",
    "Ghana": "Accra", "Morocco": "Rabat", "Senegal": "Dakar", "Canada": "Ottawa", "Mexico": "Mexico City",
    "Cuba": "Havana", "Peru": "Lima", "Chile": "Santiago", "Argentina": "Buenos Aires", "Brazil": "Brasilia",
    "Colombia": "Bogota", "Uruguay": "Montevideo", "Australia": "Canberra", "New Zealand": "Wellington",
    "Fiji": "Suva",
}  # fmt: skip
ELEMENTS = {
    "hydrogen": "H", "helium": "He", "carbon": "C", "nitrogen": "N", "oxygen": "O", "neon": "Ne", "sodium": "Na",
    "magnesium": "Mg", "aluminium": "Al", "silicon": "Si", "sulfur": "S", "chlorine": "Cl", "potassium": "K",
    "calcium": "Ca", "iron": "Fe", "copper": "Cu", "zinc": "Zn", "silver": "Ag", "tin": "Sn", "gold": "Au",
    "mercury": "Hg", "lead": "Pb",
}  # fmt: skip
ANTONYMS_ZH = {
    "大": "小", "多": "少", "高": "低", "长": "短", "快": "慢", "冷": "热", "新": "旧", "远": "近", "轻": "重",
    "早": "晚", "开": "关", "明": "暗", "强": "弱", "深": "浅", "宽": "窄", "真": "假", "胖": "瘦", "软": "硬",
    "进": "退", "胜": "败",
}  # fmt: skip
CAPITALS_ZH = {
    "法国": "巴黎", "德国": "柏林", "意大利": "罗马", "西班牙": "马德里", "日本": "东京", "韩国": "首尔",
    "泰国": "曼谷", "越南": "河内", "印度": "新德里", "埃及": "开罗", "加拿大": "渥太华", "古巴": "哈瓦那",
    "秘鲁": "利马", "巴西": "巴西利亚", "俄罗斯": "莫斯科", "英国": "伦敦", "希腊": "雅典", "挪威": "奥斯陆",
    "芬兰": "赫尔辛基", "澳大利亚": "堪培拉",
}  # fmt: skip
WEATHER = ("sunny", "cloudy", "rainy", "windy", "snowy", "foggy")
CITIES = ("Paris", "Berlin", "Rome", "Oslo", "Tokyo", "Cairo", "Lima", "Ottawa", "Hanoi", "Athens")
WEATHER_TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}

Message = dict[str, Any]


def say(role: str, content: str | None, **more: Any) -> Message:
    """A message of a conversation.

    Args:
        more: other keys of the message, such as tool_calls.
    """
    return {"role": role, "content": content, **more}


def facts_en() -> list[dict[str, Any]]:
    """Facts with a system prompt, one turn each; `id` is a number, `meta` an object."""
    system = say("system", "You are a helpful assistant who answers in one short sentence.")
    questions = []
    for country, city in CAPITALS.items():
        for question in (f"What is the capital of {country}?", f"Name the capital city of {country}."):
            questions.append((question, f"The capital of {country} is {city}.", "geography"))
    for name, symbol in ELEMENTS.items():
        questions.append(
            (f"What is the chemical symbol of {name}?", f"The symbol of {name} is {symbol}.", "chemistry")
        )
        questions.append(
            (f"Which element has the symbol {symbol}?", f"{symbol} is the symbol of {name}.", "chemistry")
        )
    return [
        {"id": i, "meta": {"topic": topic}, "messages": [system, say("user", question), say("assistant", answer)]}
        for i, (question, answer, topic) in enumerate(questions)
    ]


def dialogues_zh() -> list[dict[str, Any]]:
    """Chinese dialogues of one to three turns; `id` is a string, `meta` a list."""
    rows = []
    antonyms = list(ANTONYMS_ZH.items())
    for i, (word, opposite) in enumerate(antonyms):
        following, following_opposite = antonyms[(i + 1) % len(antonyms)]
        rows.append(
            [
                say("user", f"“{word}”的反义词是什么？"),
                say("assistant", f"“{word}”的反义词是“{opposite}”。"),
                say("user", f"那“{following}”呢？"),
                say("assistant", f"“{following}”的反义词是“{following_opposite}”。"),
            ]
        )
    for country, city in CAPITALS_ZH.items():
        rows.append(
            [
                say("user", f"{country}的首都是哪里？"),
                say("assistant", f"{country}的首都是{city}。"),
                say("user", f"{city}是哪个国家的首都？"),
                say("assistant", f"{city}是{country}的首都。"),
                say("user", "谢谢！"),
                say("assistant", "不客气。"),
            ]
        )
        rows.append([say("user", f"请问{country}的首都叫什么？"), say("assistant", f"{country}的首都是{city}。")])
    return [{"id": f"zh-{i:03}", "meta": ["中文", "对话"], "messages": m} for i, m in enumerate(rows)]


def tools_en() -> list[dict[str, Any]]:
    """Conversations in which the assistant calls a tool and reports its answer; `meta` is a string, `id` missing."""
    rows = []
    for i, city in enumerate(CITIES):
        for j in range(4):
            weather, degrees = WEATHER[(i + 2 * j) % len(WEATHER)], 3 * i + 7 * j - 5
            call = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": city}}}
            messages = [
                say("user", f"How is the weather in {city}?"),
                say("assistant", None, tool_calls=[call]),
                say("tool", json.dumps({"sky": weather, "celsius": degrees}), name="get_weather"),
                say("assistant", f"It is {weather} in {city}, at {degrees} degrees."),
            ]
            rows.append({"tools": [WEATHER_TOOL], "meta": "weather", "messages": messages})
    return rows


def reasoning_en() -> list[dict[str, Any]]:
    """Products that the assistant computes before it answers; `id` is a fraction, `meta` is missing in some rows."""
    rows = []
    for a in range(2, 12):
        for b in range(2, 12):
            thought = f"{a} times {b} is {a} added {b} times: {a * b}."
            answer = say("assistant", f"{a} x {b} = {a * b}", reasoning_content=thought)
            row = {"id": a + b / 100, "messages": [say("user", f"How much is {a} x {b}?"), answer]}
            rows.append(row if b % 2 else {**row, "meta": {"factors": [a, b]}})
    return rows


def main() -> None:
    """Writes the four files to the directory of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", type=Path)
    directory = parser.parse_args().output_dir
    directory.mkdir(parents=True, exist_ok=True)
    lines = {"facts_en.jsonl": facts_en(), "tools_en.jsonl": tools_en(), "reasoning_en.jsonl": reasoning_en()}
    for name, rows in lines.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (directory / name).write_text(text, encoding="utf-8")
    text = json.dumps(dialogues_zh(), ensure_ascii=False, indent=1)
    (directory / "dialogues_zh.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
