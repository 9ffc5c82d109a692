//! The language of the manifest: shape formulas and the checks of constraints, as trees.
//!
//! It is a part of Python's expression grammar with Python's precedence, so that `kernels/manifest.py` reads it with Python's
//! own parser:
//!
//! * integers, texts in single quotes, names;
//! * `+ - * **`, `%` and `/` by a positive number (`/` only where nothing remains), `ceil(a / b)`, `max(a, b)`, `min(a, b)`;
//! * `< <= > >= == !=`, also in chains, `in ['a', 'b']`, `not in`, `and`, `or`, `not`, `a if test else b`;
//! * `max(E for t in range(a, b) if test)` and `min(...)`, 0 where no `t` passes;
//! * of a tensor: `given(x)`, `fits(x)` (its shape is one of the entry's formulas, or it is not given), `dtype(x)` (its NKI
//!   name, `'none'` if not given), `size(x)` (bytes of an element), `rank(x)`, `shape(x, [A, B])` (it is given and has these extents); and the text
//!   `target`.
#![forbid(unsafe_code)]

/// Tokens of one expression: this bounds every recursion over its tree.
const MAX_TOKENS: usize = 256;
/// Expressions inside one another, while they are read.
const MAX_NESTING: usize = 24;

/// An expression.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Expression {
    Int(i128),
    Text(String),
    Name(String),
    Negate(Box<Expression>),
    Not(Box<Expression>),
    Arithmetic(Arithmetic, Box<[Expression; 2]>),
    /// `a < b <= c`: each comparison with what stands before it.
    Compare(Box<Expression>, Vec<(Comparison, Expression)>),
    OneOf(Box<Expression>, Vec<Expression>),
    And(Box<[Expression; 2]>),
    Or(Box<[Expression; 2]>),
    If {
        test: Box<Expression>,
        then: Box<Expression>,
        otherwise: Box<Expression>,
    },
    Extreme(Extreme, Vec<Expression>),
    Search(Box<Search>),
    Tensor(Query, String),
    /// Whether a tensor has these extents.
    Shape(String, Vec<Expression>),
}

/// An operation on two numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Arithmetic {
    Add,
    Subtract,
    Multiply,
    /// Refused where something remains.
    Divide,
    DivideUp,
    Remainder,
    Power,
}

/// A comparison.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Comparison {
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
    Equal,
    NotEqual,
}

/// The largest or the smallest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Extreme {
    Max,
    Min,
}

/// `max(item for name in range(from, to) if filter)`.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Search {
    pub(super) extreme: Extreme,
    pub(super) item: Expression,
    pub(super) name: String,
    pub(super) from: Expression,
    pub(super) to: Expression,
    pub(super) filter: Option<Expression>,
}

/// What can be asked of a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Query {
    Given,
    Fits,
    Dtype,
    Size,
    Rank,
}

/// A shape: the extents of each alternative, outermost first.
pub(super) type Formula = Vec<Vec<Expression>>;

impl Expression {
    /// Reads an expression.
    pub(super) fn parse(text: &str) -> Result<Expression, String> {
        let mut reader = Reader::new(text)?;
        let expression = reader.expression()?;
        reader.end()?;
        Ok(expression)
    }

    /// Calls `f` for every name and tensor in the expression, in the order of the text.
    pub(super) fn names<'a>(&'a self, f: &mut dyn FnMut(&'a str)) {
        use Expression::*;
        match self {
            Int(_) | Text(_) => {}
            Name(name) | Tensor(_, name) => f(name),
            Negate(a) | Not(a) => a.names(f),
            Arithmetic(_, two) | And(two) | Or(two) => two.iter().for_each(|e| e.names(f)),
            Compare(first, rest) => {
                first.names(f);
                rest.iter().for_each(|(_, e)| e.names(f));
            }
            OneOf(a, list) => {
                a.names(f);
                list.iter().for_each(|e| e.names(f));
            }
            If { test, then, otherwise } => [test, then, otherwise].into_iter().for_each(|e| e.names(f)),
            Extreme(_, list) => list.iter().for_each(|e| e.names(f)),
            Shape(name, list) => {
                f(name);
                list.iter().for_each(|e| e.names(f));
            }
            Search(s) => {
                for e in [&s.item, &s.from, &s.to].into_iter().chain(&s.filter) {
                    e.names(&mut |name| {
                        if name != s.name {
                            f(name)
                        }
                    });
                }
            }
        }
    }
}

/// Reads a shape formula: `[M, ceil(K / 128)]`, alternatives separated by `|`.
pub(super) fn formula(text: &str) -> Result<Formula, String> {
    let mut reader = Reader::new(text)?;
    let mut alternatives = Vec::new();
    loop {
        reader.expect("[")?;
        alternatives.push(reader.list("]")?);
        if !reader.take("|") {
            break;
        }
    }
    reader.end()?;
    Ok(alternatives)
}

/// Whether `name` can be a name of this language.
pub(super) fn is_name(name: &str) -> bool {
    let mut bytes = name.bytes();
    bytes.next().is_some_and(|b| b.is_ascii_alphabetic() || b == b'_')
        && bytes.all(|b| b.is_ascii_alphanumeric() || b == b'_')
        && !WORDS.contains(&name)
}

/// Words that are not names.
const WORDS: [&str; 19] = [
    "and", "or", "not", "in", "if", "else", "for", "range", "ceil", "max", "min", "given", "fits", "dtype", "size",
    "rank", "shape", "target", "none",
];
const SIGNS: [&str; 20] =
    ["**", "<=", ">=", "==", "!=", "<", ">", "+", "-", "*", "/", "%", "(", ")", "[", "]", ",", "|", "=", "!"];

#[derive(Debug, Clone, PartialEq)]
enum Token {
    Int(i128),
    Text(String),
    Word(String),
    Sign(&'static str),
}

struct Reader {
    tokens: std::vec::IntoIter<Token>,
    nesting: usize,
}

type Read<T> = Result<T, String>;

impl Reader {
    fn new(text: &str) -> Read<Reader> {
        let mut tokens = Vec::new();
        let mut rest = text.trim_start();
        while let Some(first) = rest.chars().next() {
            if tokens.len() == MAX_TOKENS {
                return Err(format!("more than {MAX_TOKENS} words and signs"));
            }
            let span = |f: fn(char) -> bool| rest.find(|c| !f(c)).unwrap_or(rest.len());
            let (token, used) = if first.is_ascii_digit() {
                let used = span(|c| c.is_ascii_alphanumeric());
                let digits = &rest[..used];
                let number = digits.parse().map_err(|_| format!("{digits} is not a number that fits 127 bits"))?;
                (Token::Int(number), used)
            } else if first.is_ascii_alphabetic() || first == '_' {
                let used = span(|c| c.is_ascii_alphanumeric() || c == '_');
                (Token::Word(rest[..used].into()), used)
            } else if first == '\'' {
                let inside = &rest[1..];
                let close = inside.find('\'').ok_or("a text without its closing quote")?;
                if inside[..close].contains('\\') {
                    return Err("a backslash in a text".into());
                }
                (Token::Text(inside[..close].into()), close + 2)
            } else {
                let sign = SIGNS.into_iter().find(|s| rest.starts_with(s));
                let sign = sign.ok_or_else(|| format!("{first:?} has no meaning here"))?;
                (Token::Sign(sign), sign.len())
            };
            tokens.push(token);
            rest = rest[used..].trim_start();
        }
        Ok(Reader { tokens: tokens.into_iter(), nesting: 0 })
    }

    fn next_is(&self, text: &str) -> bool {
        match self.tokens.as_slice().first() {
            Some(Token::Sign(sign)) => *sign == text,
            Some(Token::Word(word)) => word == text,
            _ => false,
        }
    }

    fn take(&mut self, text: &str) -> bool {
        let found = self.next_is(text);
        if found {
            self.tokens.next();
        }
        found
    }

    fn expect(&mut self, text: &str) -> Read<()> {
        if self.take(text) { Ok(()) } else { Err(format!("{}, needed {text}", self.found())) }
    }

    fn end(&mut self) -> Read<()> {
        if self.tokens.as_slice().is_empty() { Ok(()) } else { Err(format!("{}, needed the end", self.found())) }
    }

    /// What stands next, for a message.
    fn found(&self) -> String {
        match self.tokens.as_slice().first() {
            None => "got the end".into(),
            Some(Token::Int(number)) => format!("got {number}"),
            Some(Token::Text(text)) => format!("got '{text}'"),
            Some(Token::Word(word)) => format!("got {word}"),
            Some(Token::Sign(sign)) => format!("got {sign}"),
        }
    }

    fn deeper<T>(&mut self, read: impl FnOnce(&mut Self) -> Read<T>) -> Read<T> {
        if self.nesting == MAX_NESTING {
            return Err(format!("more than {MAX_NESTING} expressions inside one another"));
        }
        self.nesting += 1;
        let result = read(self);
        self.nesting -= 1;
        result
    }

    /// Expressions separated by commas, up to `close`.
    fn list(&mut self, close: &str) -> Read<Vec<Expression>> {
        let mut list = vec![self.expression()?];
        while self.take(",") {
            list.push(self.expression()?);
        }
        self.expect(close)?;
        Ok(list)
    }

    fn expression(&mut self) -> Read<Expression> {
        self.deeper(|r| {
            let value = r.either()?;
            if !r.take("if") {
                return Ok(value);
            }
            let test = r.either()?;
            r.expect("else")?;
            let otherwise = r.expression()?;
            Ok(Expression::If { test: test.into(), then: value.into(), otherwise: otherwise.into() })
        })
    }

    fn either(&mut self) -> Read<Expression> {
        let mut left = self.both()?;
        while self.take("or") {
            left = Expression::Or([left, self.both()?].into());
        }
        Ok(left)
    }

    fn both(&mut self) -> Read<Expression> {
        let mut left = self.negation()?;
        while self.take("and") {
            left = Expression::And([left, self.negation()?].into());
        }
        Ok(left)
    }

    fn negation(&mut self) -> Read<Expression> {
        if self.take("not") {
            let inner = self.deeper(Self::negation)?;
            return Ok(Expression::Not(inner.into()));
        }
        self.comparison()
    }

    fn comparison(&mut self) -> Read<Expression> {
        let first = self.sum()?;
        let outside = self.take("not");
        if outside || self.next_is("in") {
            self.expect("in")?;
            self.expect("[")?;
            let inside = Expression::OneOf(first.into(), self.list("]")?);
            return Ok(if outside { Expression::Not(inside.into()) } else { inside });
        }
        let mut rest = Vec::new();
        while let Some(comparison) = self.comparison_sign() {
            rest.push((comparison, self.sum()?));
        }
        Ok(if rest.is_empty() { first } else { Expression::Compare(first.into(), rest) })
    }

    fn comparison_sign(&mut self) -> Option<Comparison> {
        use Comparison::*;
        let signs =
            [("<", Less), ("<=", LessOrEqual), (">", Greater), (">=", GreaterOrEqual), ("==", Equal), ("!=", NotEqual)];
        signs.into_iter().find(|(sign, _)| self.take(sign)).map(|(_, comparison)| comparison)
    }

    fn sum(&mut self) -> Read<Expression> {
        let mut left = self.product()?;
        loop {
            let sign = if self.take("+") {
                Arithmetic::Add
            } else if self.take("-") {
                Arithmetic::Subtract
            } else {
                return Ok(left);
            };
            left = Expression::Arithmetic(sign, [left, self.product()?].into());
        }
    }

    fn product(&mut self) -> Read<Expression> {
        let mut left = self.signed()?;
        loop {
            let sign = if self.take("*") {
                Arithmetic::Multiply
            } else if self.take("/") {
                Arithmetic::Divide
            } else if self.take("%") {
                Arithmetic::Remainder
            } else {
                return Ok(left);
            };
            left = Expression::Arithmetic(sign, [left, self.signed()?].into());
        }
    }

    /// `-a`, and `a ** b`, which binds more strongly than a sign before it and less than one after it.
    fn signed(&mut self) -> Read<Expression> {
        if self.take("-") {
            let inner = self.deeper(Self::signed)?;
            return Ok(Expression::Negate(inner.into()));
        }
        let base = self.atom()?;
        if !self.take("**") {
            return Ok(base);
        }
        let exponent = self.deeper(Self::signed)?;
        Ok(Expression::Arithmetic(Arithmetic::Power, [base, exponent].into()))
    }

    fn atom(&mut self) -> Read<Expression> {
        if self.take("(") {
            let inner = self.expression()?;
            self.expect(")")?;
            return Ok(inner);
        }
        let found = self.found();
        match self.tokens.next() {
            Some(Token::Int(number)) => Ok(Expression::Int(number)),
            Some(Token::Text(text)) => Ok(Expression::Text(text)),
            Some(Token::Word(word)) => match word.as_str() {
                "ceil" => self.divide_up(),
                "max" => self.extreme(Extreme::Max),
                "min" => self.extreme(Extreme::Min),
                "given" => self.query(Query::Given),
                "fits" => self.query(Query::Fits),
                "dtype" => self.query(Query::Dtype),
                "size" => self.query(Query::Size),
                "rank" => self.query(Query::Rank),
                "shape" => self.shape(),
                "target" => Ok(Expression::Name(word)),
                name if is_name(name) => Ok(Expression::Name(word)),
                _ => Err(format!("{found}, needed a value")),
            },
            _ => Err(format!("{found}, needed a value")),
        }
    }

    fn name(&mut self) -> Read<String> {
        let found = self.found();
        match self.tokens.next() {
            Some(Token::Word(word)) if is_name(&word) => Ok(word),
            _ => Err(format!("{found}, needed a name")),
        }
    }

    fn query(&mut self, query: Query) -> Read<Expression> {
        self.expect("(")?;
        let name = self.name()?;
        self.expect(")")?;
        Ok(Expression::Tensor(query, name))
    }

    fn shape(&mut self) -> Read<Expression> {
        self.expect("(")?;
        let name = self.name()?;
        self.expect(",")?;
        self.expect("[")?;
        let extents = self.list("]")?;
        self.expect(")")?;
        Ok(Expression::Shape(name, extents))
    }

    fn divide_up(&mut self) -> Read<Expression> {
        self.expect("(")?;
        let inner = self.expression()?;
        self.expect(")")?;
        match inner {
            Expression::Arithmetic(Arithmetic::Divide, two) => Ok(Expression::Arithmetic(Arithmetic::DivideUp, two)),
            _ => Err("ceil of something else than a / b".into()),
        }
    }

    fn extreme(&mut self, extreme: Extreme) -> Read<Expression> {
        self.expect("(")?;
        let first = self.expression()?;
        if !self.take("for") {
            let mut list = vec![first];
            while self.take(",") {
                list.push(self.expression()?);
            }
            self.expect(")")?;
            let enough = list.len() > 1;
            return if enough { Ok(Expression::Extreme(extreme, list)) } else { Err("max or min of one value".into()) };
        }
        let name = self.name()?;
        self.expect("in")?;
        self.expect("range")?;
        self.expect("(")?;
        let from = self.expression()?;
        self.expect(",")?;
        let to = self.expression()?;
        self.expect(")")?;
        let filter = if self.take("if") { Some(self.deeper(Self::either)?) } else { None };
        self.expect(")")?;
        Ok(Expression::Search(Search { extreme, item: first, name, from, to, filter }.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_of_the_language_is_refused_in_words() {
        for (text, problem) in [
            ("", "got the end, needed a value"),
            ("1 +", "got the end, needed a value"),
            ("M N", "got N, needed the end"),
            ("'a", "a text without its closing quote"),
            ("M & N", "'&' has no meaning here"),
            ("ceil(M)", "ceil of something else than a / b"),
            ("max(M)", "max or min of one value"),
            ("max(M, for)", "got for, needed a value"),
            ("fits(1)", "got 1, needed a name"),
            ("max(t for t in range(1, 2)", "got the end, needed )"),
            ("a not b", "got b, needed in"),
            ("12ab", "12ab is not a number that fits 127 bits"),
            ("a = b", "got =, needed the end"),
        ] {
            assert_eq!(Expression::parse(text).unwrap_err(), problem, "{text}");
        }
        assert_eq!(formula("[M, K] | 3").unwrap_err(), "got 3, needed [");
        assert!(formula("[]").is_err());
    }

    /// What could recurse without end is bounded while it is read.
    #[test]
    fn nesting_and_length_are_bounded() {
        for unit in ["(", "-", "not ", "2 ** ", "1 if 1 else ", "max(1, ", "ceil("] {
            let deep = format!("{}1", unit.repeat(60));
            assert!(Expression::parse(&deep).unwrap_err().starts_with("more than 24 expressions"), "{unit}");
        }
        for unit in [" + 1", " * 1", " and 1", " or 1", " < 1", " - 1"] {
            assert!(Expression::parse(&format!("1{}", unit.repeat(127))).is_ok());
            let long = format!("1{}", unit.repeat(200));
            assert_eq!(Expression::parse(&long).unwrap_err(), "more than 256 words and signs");
        }
    }

    #[test]
    fn names_are_those_that_are_free() {
        let mut found = Vec::new();
        let text = "max(t * A for t in range(B, C) if t % D == 0) + (E if fits(x) else dtype(y) in ['F'])";
        let parsed = Expression::parse(text).unwrap();
        parsed.names(&mut |name| found.push(name));
        assert_eq!(found, ["A", "B", "C", "D", "x", "E", "y"]);
    }
}
