//! Counts the messages of gRPC in a body as it passes (each has five bytes before it: a flag and its length).

/// How far it has come.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Messages {
    /// Messages that have begun.
    count: u64,
    /// Bytes of the prefix that were seen.
    prefix: u8,
    /// The length, as far as it was seen.
    length: u32,
    /// Bytes of the message that are to come.
    left: u64,
}

impl Messages {
    /// Looks at the next bytes.
    pub(crate) fn pass(&mut self, mut data: &[u8]) {
        while let Some(first) = data.first() {
            if self.left > 0 {
                let part = data.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
                self.left -= part as u64;
                data = data.get(part..).unwrap_or_default();
                continue;
            }
            // The first of the five says whether it is compressed.
            if self.prefix > 0 {
                self.length = (self.length << 8) | u32::from(*first);
            }
            self.prefix += 1;
            data = data.get(1..).unwrap_or_default();
            if self.prefix == 5 {
                self.count += 1;
                self.left = u64::from(self.length);
                (self.prefix, self.length) = (0, 0);
            }
        }
    }

    /// How many there were.
    pub(crate) fn count(self) -> u64 {
        self.count
    }
}

#[cfg(test)]
mod tests {
    use super::Messages;

    #[test]
    fn messages_are_counted_however_they_are_cut() {
        let mut body = Vec::new();
        for length in [0_u32, 1, 300, 0, 70_000] {
            body.push(0);
            body.extend_from_slice(&length.to_be_bytes());
            body.extend(std::iter::repeat_n(1, length as usize));
        }
        for size in [1, 2, 3, 5, 7, 1000, body.len()] {
            let mut messages = Messages::default();
            body.chunks(size).for_each(|part| messages.pass(part));
            assert_eq!(messages.count(), 5, "in parts of {size}");
        }
    }
}
