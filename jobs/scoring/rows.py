"""The tables of an evaluation: scored answers, and those to the controls."""

from jobs.core.conversation_rows import ConversationRow
from jobs.core.rows import Rows


class AnswerRow(ConversationRow):
    """One scored answer to a question of the test split."""

    answer: str
    token_ids: list[int]  # new ones, the end token included
    tokens: int  # new ones, without the end token
    stopped: bool  # an end token came before max_new_tokens
    similarity: float  # cosine of the embeddings of answer and reference, -1 to 1
    baseline: float  # score of the embedded baseline, 0 to 1
    verdict: str | None  # of the disease's name: right, wrong, none, multiple, refused; None: not asked for
    named: str | None  # the class that the answer names
    loop_tokens: int  # length of the repetition at the end, 0: none


class ControlRow(AnswerRow):
    """One scored answer without its image (jobs.scoring.image_controls)."""

    control: str  # blank or swapped
    shown: str | None  # whole path of the other image


ANSWERS = Rows("answers.parquet", AnswerRow)
CONTROLS = Rows("controls.parquet", ControlRow)
