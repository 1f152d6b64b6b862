"""Chat templates that treat the system turn in their own ways."""

from tests.judging import CHAT_ML

REFUSES = (  # as Gemma's
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHAT_ML
)


DROPS = CHAT_ML.replace("in messages %}", "in messages if message['role'] != 'system' %}")
