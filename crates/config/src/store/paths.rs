//! Numbers for files: an object says by four bytes in which one it is.

use std::sync::Arc;

/// The paths by their numbers.
#[derive(Debug, Default)]
pub(super) struct Paths {
    list: Vec<Option<Arc<str>>>,
    free: Vec<u32>,
}

impl Paths {
    /// Gives a path a number of its own.
    pub(super) fn add(&mut self, path: &Arc<str>) -> u32 {
        if let Some(number) = self.free.pop() {
            if let Some(place) = self.list.get_mut(number as usize) {
                *place = Some(path.clone());
            }
            return number;
        }
        self.list.push(Some(path.clone()));
        u32::try_from(self.list.len() - 1).unwrap_or(u32::MAX) // as many as there are files at most
    }

    /// The path of a number.
    pub(super) fn get(&self, number: u32) -> Option<&Arc<str>> {
        self.list.get(number as usize)?.as_ref()
    }

    /// Takes a number back: no object has it any more.
    pub(super) fn remove(&mut self, number: u32) {
        if self.list.get_mut(number as usize).and_then(Option::take).is_some() {
            self.free.push(number);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_that_is_taken_back_is_given_again() {
        let mut paths = Paths::default();
        let (a, b): (Arc<str>, Arc<str>) = ("a".into(), "b".into());
        assert_eq!((paths.add(&a), paths.add(&b)), (0, 1));
        assert_eq!(paths.get(1), Some(&b));
        paths.remove(0);
        paths.remove(0);
        assert_eq!(paths.get(0), None);
        assert_eq!((paths.add(&b), paths.add(&a)), (0, 2));
    }
}
