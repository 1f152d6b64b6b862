"""Pure formulas: functions of tensors and numbers, no models, no files, no clocks."""
