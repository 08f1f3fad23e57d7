"""Lines in languages that GPT-2's merges split into bytes, and others that they do not."""

GREEK = [
    "Το φως του φάρου ανάβει και η θάλασσα δεν λέει τίποτα.",
    "Δύο άντρες κάθονται στη βάρκα, και ο ένας κοιτάζει τη θάλασσα.",
    "Η βάρκα έχει μια τρύπα, και το νερό ανεβαίνει αργά.",
    "Ποιος θα ανάψει το φως του φάρου όταν έρθει η νύχτα;",
]
HINDI = [
    "दीपक जलता है और समुद्र कुछ नहीं कहता।",
    "नाव में दो आदमी बैठे हैं, और एक समुद्र को देखता है।",
    "नाव में एक छेद है, और पानी धीरे धीरे बढ़ता है।",
    "जब रात आएगी तब दीपक कौन जलाएगा?",
]
KOREAN = [
    "등불이 켜지고 바다는 아무 말도 하지 않는다.",
    "배에는 두 사람이 앉아 있고 한 사람은 바다를 바라본다.",
    "배에는 구멍이 있고 물은 천천히 차오른다.",
    "밤이 오면 누가 등불을 켤 것인가?",
]
EMOJI = ["🤗🤗 👩‍👩‍👧 🚢⚓ 🤗", "🚢⚓🚢⚓ 🌊🌊🌊", "👩‍👩‍👧 🌊 🤗🤗", "🌊🌊🌊 🚢⚓"]
CODE = [
    "def lamp(x):\n    return [x ** 2 for x in range(10)]\n",
    "class Lamp:\n    def __init__(self):\n        self.lit = False\n",
    "for (int i = 0; i < n; ++i) { sum += a[i]; }\n",
    "if __name__ == '__main__':\n\tprint(lamp(3))\n",
]
LANGUAGES = {"greek": GREEK, "hindi": HINDI, "korean": KOREAN, "emoji": EMOJI, "code": CODE}


def text_in(language: str, n_lines: int = 40) -> str:
    """A text of so many lines, each with a number of its own."""
    lines = LANGUAGES[language]
    return "".join(f"{lines[n % len(lines)]} {n}\n" for n in range(n_lines))
