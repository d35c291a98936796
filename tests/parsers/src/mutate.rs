//! Changed input without coverage guidance: the same seed gives the same inputs.

/// Makes inputs from seeds.
#[derive(Debug)]
pub struct Mutator {
    state: u64,
    seeds: Vec<Vec<u8>>,
}

/// Values that parsers stumble over.
const WORDS: [&[u8]; 24] = [
    b"\0",
    b"\xff",
    b"\xff\xff\xff\xff",
    b"\x7f\xff\xff\xff",
    b"\x80",
    b"\r\n",
    b"\n",
    b" ",
    b"\t",
    b"-1",
    b"0",
    b"65536",
    b"99999999999999999999",
    b"[]",
    b"{}",
    b"null",
    b"*",
    b": ",
    b"- ",
    b"/",
    b"%2f",
    b"..",
    "é".as_bytes(),
    "\u{feff}".as_bytes(),
];

/// Longer inputs are cut.
const LONGEST: usize = 64 << 10;

impl Mutator {
    /// Starts over from `seeds`.
    #[must_use]
    pub fn new(seeds: Vec<Vec<u8>>, start: u64) -> Self {
        // The state of a xorshift may not be zero.
        Self { state: start | 1, seeds }
    }

    fn below(&mut self, end: usize) -> usize {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        usize::try_from(self.state % (end.max(1) as u64)).unwrap_or(0)
    }

    /// The next input.
    pub fn next_input(&mut self) -> Vec<u8> {
        let seed = self.below(self.seeds.len());
        let mut bytes = self.seeds[seed].clone();
        for _ in 0..=self.below(5) {
            self.change(&mut bytes);
        }
        bytes.truncate(LONGEST);
        bytes
    }

    fn change(&mut self, bytes: &mut Vec<u8>) {
        let at = self.below(bytes.len() + 1);
        let end = (at + self.below(16)).min(bytes.len());
        match self.below(8) {
            0 if at < bytes.len() => bytes[at] ^= 1 << self.below(8),
            1 if at < bytes.len() => bytes[at] = u8::try_from(self.below(256)).unwrap_or(0),
            2 => drop(bytes.splice(at..end, [])),
            3 => {
                let word = WORDS[self.below(WORDS.len())];
                bytes.splice(at..end, word.iter().copied());
            }
            4 => {
                let word = WORDS[self.below(WORDS.len())];
                bytes.splice(at..at, word.iter().copied());
            }
            5 => {
                let copied = bytes[at..(at + self.below(200)).min(bytes.len())].to_vec();
                let to = self.below(bytes.len() + 1);
                bytes.splice(to..to, copied);
            }
            6 => {
                let other = self.below(self.seeds.len());
                let from = self.below(self.seeds[other].len() + 1);
                let tail = self.seeds[other][from..].to_vec();
                bytes.splice(at.., tail);
            }
            _ if self.below(4) == 0 => bytes.truncate(at),
            _ => {}
        }
    }
}
