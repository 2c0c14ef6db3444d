/*
 * Parses and formats words and numbers without a C library.
 *
 * Part of identity.c.
 */

static int starts(char *text, char *with)
{
    while (*with)
        if (*text++ != *with++)
            return 0;
    return 1;
}

static int same(char *text, char *other)
{
    return starts(text, other) && !text[length(other)];
}

/* Append text to the string that ends at end; return the new end. */
static char *put(char *end, char *text)
{
    while (*text)
        *end++ = *text++;
    *end = 0;
    return end;
}

static char *put_number(char *end, unsigned long value, int base, int digits)
{
    char text[24], *first = text + sizeof text - 1;
    *first = 0;
    while (value || digits > 0) {
        *--first = "0123456789abcdef"[value % base];
        value /= base;
        digits--;
    }
    return put(end, first);
}

/* Cut the first word off; return it. */
static char *word(char **rest)
{
    char *first = *rest, *end = first;
    while (*end && *end != ' ')
        end++;
    *rest = *end ? end + 1 : end;
    *end = 0;
    return first;
}

static int digit(char c)
{
    if (c >= '0' && c <= '9')
        return c - '0';
    return c >= 'a' && c <= 'f' ? c - 'a' + 10 : 16;
}

/* Parse a number up to the first character that is not a digit of its base. */
static unsigned long number(char **text, int base)
{
    unsigned long value = 0;
    for (; digit(**text) < base; (*text)++)
        value = value * base + digit(**text);
    return value;
}
