"""The LLM judge: engines, verdicts, judged tables, agreement with people."""
