"""The table of questions that jobs.prepare writes and everything else reads."""

from typing import TypedDict

from jobs.core.rows import Rows

# Functional syntax, here and where rows build on it: `class` is a keyword.
ConversationRow = TypedDict(
    "ConversationRow",
    {
        "sample_id": str,  # path below data.root # question id
        "image": str,  # whole path
        "sha256": str,  # of the image file
        "class": str,  # the disease
        "question_id": str,
        "question": str,
        "reference": str,
        "split": str,  # train or test
        "group": int,  # number of the series, or of the near-duplicates: what intervals resample
    },
)
CONVERSATIONS = Rows("conversations.parquet", ConversationRow)
