//! Weights that can be drawn from: a Fenwick tree (P. Fenwick, "A new data structure for cumulative frequency
//! tables", 1994).

/// Weights of slots 0 to n-1. A change and a draw take log2(n) steps.
#[derive(Debug, Default)]
pub(crate) struct Sums {
    /// Node i (from 1) holds the sum of the slots i-lowbit(i) to i-1. Node 0 is not used.
    tree: Box<[u64]>,
    total: u64,
}

fn low_bit(i: usize) -> usize {
    i & i.wrapping_neg()
}

impl Sums {
    /// Takes n steps.
    pub(crate) fn new(weights: impl ExactSizeIterator<Item = u32>) -> Self {
        let mut tree: Box<[u64]> = std::iter::once(0).chain(weights.map(u64::from)).collect();
        let total = tree.iter().sum();
        for i in 1..tree.len() {
            let parent = i + low_bit(i);
            let value = tree.get(i).copied().unwrap_or(0);
            if let Some(sum) = tree.get_mut(parent) {
                *sum += value;
            }
        }
        Self { tree, total }
    }

    /// `slots` slots of weight 0.
    pub(crate) fn zeros(slots: usize) -> Self {
        Self { tree: vec![0; slots + 1].into(), total: 0 }
    }

    /// Whether there are no slots.
    pub(crate) fn is_unused(&self) -> bool {
        self.tree.is_empty()
    }

    /// The sum of all weights.
    pub(crate) fn total(&self) -> u64 {
        self.total
    }

    /// The sum of the weights before `slot`.
    pub(crate) fn before(&self, slot: usize) -> u64 {
        let (mut i, mut sum) = (slot.min(self.tree.len().saturating_sub(1)), 0);
        while i > 0 {
            sum += self.tree.get(i).copied().unwrap_or(0);
            i -= low_bit(i);
        }
        sum
    }

    /// The weight of `slot`.
    pub(crate) fn weight(&self, slot: usize) -> u64 {
        self.before(slot + 1) - self.before(slot)
    }

    /// Changes the weight of `slot`.
    pub(crate) fn set(&mut self, slot: usize, weight: u64) {
        let old = self.weight(slot);
        let mut i = slot + 1;
        if i >= self.tree.len() {
            return;
        }
        while let Some(sum) = self.tree.get_mut(i) {
            *sum = *sum - old + weight;
            i += low_bit(i);
        }
        self.total = self.total - old + weight;
    }

    /// The slot that `point`, counted from 0 over all weights, falls into; `None` from the total on.
    pub(crate) fn slot_at(&self, point: u64) -> Option<usize> {
        if point >= self.total {
            return None;
        }
        let (mut at, mut rest) = (0, point);
        let mut step = self.tree.len().next_power_of_two();
        while step > 0 {
            if let Some(sum) = self.tree.get(at + step)
                && *sum <= rest
            {
                at += step;
                rest -= sum;
            }
            step /= 2;
        }
        Some(at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn sums_are_those_of_a_list(
            start in prop::collection::vec(0..5u32, 0..70),
            changes in prop::collection::vec((any::<prop::sample::Index>(), 0..9u64), 0..20),
        ) {
            let mut sums = Sums::new(start.clone().into_iter());
            let mut list: Vec<u64> = start.into_iter().map(u64::from).collect();
            for (at, weight) in changes {
                if list.is_empty() { break }
                let at = at.index(list.len());
                list[at] = weight;
                sums.set(at, weight);
            }
            let total: u64 = list.iter().sum();
            prop_assert_eq!(sums.total(), total);
            // Each slot comes out for as many points as it weighs, in order.
            let wanted: Vec<usize> =
                list.iter().enumerate().flat_map(|(i, w)| std::iter::repeat_n(i, *w as usize)).collect();
            let got: Vec<usize> = (0..total).map(|p| sums.slot_at(p).unwrap()).collect();
            prop_assert_eq!(got, wanted);
            prop_assert_eq!(sums.slot_at(total), None);
            for i in 0..list.len() {
                prop_assert_eq!(sums.before(i), list[..i].iter().sum::<u64>());
                prop_assert_eq!(sums.weight(i), list[i]);
            }
        }
    }
}
