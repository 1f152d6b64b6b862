"""Numbers that the paper prints."""

# The authors' published removal order (zero-based), and the parameters in billions that Table 1 prints.
ORDER = (23, 4, 18, 22, 21, 24, 17, 27, 20, 26, 19, 29, 28, 5)


TABLE_1 = {0: 7.063, 2: 6.659, 4: 6.254, 7: 5.647, 8: 5.444, 9: 5.242, 10: 5.040}
