"""Lines that differ in colour, for colour-blind eyes too, and in dashes, for print in grey."""

# Colours of Okabe and Ito (Color Universal Design, 2008), each with a dash pattern.
STYLES = (("#0072B2", "-"), ("#D55E00", "--"), ("#009E73", "-."), ("#CC79A7", ":"), ("#000000", (0, (6, 1, 1, 1, 1, 1))))
