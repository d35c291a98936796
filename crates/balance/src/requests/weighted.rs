//! Members with weights, drawn at random or taken in turn.

/// Slots with weights. What is drawn is a point below the total; each slot has as many points as it weighs.
#[derive(Debug, Default)]
pub(crate) struct Weighted {
    members: Box<[u32]>,
    /// The weights up to and with each slot; empty where all weigh 1.
    sums: Box<[u64]>,
    total: u64,
    /// What points are apart that follow each other in turn, see [`stride`].
    stride: u64,
}

/// A slot that must not be drawn.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) struct Hole {
    start: u64,
    weight: u64,
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// The largest partial quotient of the continued fraction of `stride / total`; none where they have a divisor in
/// common, or where one is more than `most`.
fn quotient(stride: u64, total: u64, most: u64) -> Option<u64> {
    let (mut a, mut b, mut largest) = (total, stride, 0);
    while b > 0 {
        largest = largest.max(a / b);
        if largest > most {
            return None;
        }
        (a, b) = (b, a % b);
    }
    (a == 1).then_some(largest)
}

/// What points are apart that follow each other in turn, below `total`.
///
/// It has no divisor in common with the total, so all points come once before the first comes again. And those of a
/// slot come evenly: by the theorem of three distances a slot waits at most `q + 2` times as long as is even, where `q`
/// is the largest partial quotient of the stride by the total. So it is the nearest to the golden section, whose
/// quotients are all 1, that has none above 4, or the one with the least quotient where none is so near.
fn stride(total: u64) -> u64 {
    const NEAR: u64 = 256;
    const GOOD: u64 = 4;
    // The golden section in 1/2^64.
    let golden = u64::try_from((u128::from(total) * 0x9e37_79b9_7f4a_7c15) >> 64).unwrap_or(1);
    let mut best = (u64::MAX, 1);
    for distance in 0..NEAR.min(total) {
        for near in [golden.saturating_add(distance), golden.saturating_sub(distance)] {
            if (1..total).contains(&near)
                && let Some(largest) = quotient(near, total, best.0.saturating_sub(1))
            {
                best = (largest, near);
            }
        }
        if best.0 <= GOOD {
            break;
        }
    }
    best.1
}

impl Weighted {
    /// Takes n steps. Members without weight are left out.
    pub(crate) fn new(list: impl Iterator<Item = (u32, u32)>) -> Self {
        let (members, weights): (Vec<u32>, Vec<u64>) =
            list.filter(|(_, weight)| *weight > 0).map(|(m, weight)| (m, u64::from(weight))).unzip();
        let unit = weights.iter().fold(0, |unit, weight| gcd(*weight, unit)).max(1);
        let total: u64 = weights.iter().map(|weight| weight / unit).sum();
        if total == members.len() as u64 {
            return Self { members: members.into(), sums: Box::default(), total, stride: 1 };
        }
        let mut sum = 0;
        let sums = weights.iter().map(|weight| {
            sum += weight / unit;
            sum
        });
        let sums = sums.collect();
        Self { members: members.into(), sums, total, stride: stride(total) }
    }

    /// The sum of the weights, in units of their greatest common divisor.
    pub(crate) fn total(&self) -> u64 {
        self.total
    }

    /// The member in a slot.
    pub(crate) fn member(&self, slot: usize) -> Option<u32> {
        self.members.get(slot).copied()
    }

    /// The weight of a slot.
    pub(crate) fn weight(&self, slot: usize) -> u64 {
        self.hole(slot).weight
    }

    pub(crate) fn hole(&self, slot: usize) -> Hole {
        if self.sums.is_empty() {
            return Hole { start: slot as u64, weight: 1 };
        }
        let start = slot.checked_sub(1).and_then(|before| self.sums.get(before)).copied().unwrap_or(0);
        Hole { start, weight: self.sums.get(slot).map_or(0, |sum| sum - start) }
    }

    fn slot(&self, point: u64) -> usize {
        if self.sums.is_empty() {
            return usize::try_from(point).unwrap_or(usize::MAX);
        }
        self.sums.partition_point(|sum| *sum <= point)
    }

    /// The slot whose turn it is as number `count`.
    pub(crate) fn turn(&self, count: u64) -> Option<usize> {
        let count = count.checked_rem(self.total)?;
        let point = u128::from(count) * u128::from(self.stride) % u128::from(self.total);
        Some(self.slot(u64::try_from(point).ok()?))
    }

    /// A slot by weight, outside of `holes`, which are sorted and do not overlap.
    pub(crate) fn draw(&self, holes: &[Hole], random: u64) -> Option<usize> {
        let left = self.total.checked_sub(holes.iter().map(|hole| hole.weight).sum())?;
        if left == 0 {
            return None;
        }
        let mut point = u64::try_from((u128::from(random) * u128::from(left)) >> 64).ok()?;
        for hole in holes {
            if point >= hole.start {
                point += hole.weight;
            }
        }
        Some(self.slot(point))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn of(weights: &[u32]) -> Weighted {
        Weighted::new((0u32..).zip(weights.iter().copied()))
    }

    proptest! {
        #[test]
        fn in_turn_each_comes_as_often_as_it_weighs_and_evenly(
            weights in prop::collection::vec(0..40u32, 1..20),
            start in any::<u32>(),
        ) {
            let list = of(&weights);
            let total = list.total();
            let unit = weights.iter().fold(0, |u, w| gcd(u64::from(*w), u)).max(1);
            let mut counts = vec![0u64; weights.len()];
            let mut last: Vec<Option<u64>> = vec![None; weights.len()];
            for n in 0..2 * total {
                let at = list.member(list.turn(u64::from(start) + n).unwrap()).unwrap() as usize;
                counts[at] += 1;
                // Never much farther apart than is even.
                if let Some(before) = last[at] {
                    let even = (total * unit).div_ceil(u64::from(weights[at]));
                    prop_assert!(n - before <= 7 * even, "{} apart, {even} were even", n - before);
                }
                last[at] = Some(n);
            }
            for (count, weight) in counts.iter().zip(&weights) {
                prop_assert_eq!(count * unit, 2 * u64::from(*weight));
            }
        }

        #[test]
        fn strides_of_any_total_are_even(total in prop_oneof![2..5_000u64, 2..=u64::MAX]) {
            let stride = stride(total);
            let largest = quotient(stride, total, u64::MAX);
            prop_assert!(largest.is_some_and(|q| q <= if total < 5_000 { 5 } else { 16 }), "{stride}: {largest:?}");
        }

        #[test]
        fn draws_are_those_of_a_list_without_its_holes(
            weights in prop::collection::vec(0..9u32, 1..20),
            without in prop::collection::btree_set(0..20usize, 0..5),
            random in any::<u64>(),
        ) {
            let list = of(&weights);
            let kept: Vec<u32> = (0u32..).zip(&weights).filter(|(_, w)| **w > 0).map(|(i, _)| i).collect();
            let gone: Vec<usize> = without.into_iter().filter(|slot| *slot < kept.len()).collect();
            let holes: Vec<Hole> = gone.iter().map(|slot| list.hole(*slot)).collect();
            let naive: Vec<usize> = (0..kept.len())
                .filter(|slot| !gone.contains(slot))
                .flat_map(|slot| std::iter::repeat_n(slot, list.weight(slot) as usize))
                .collect();
            let expected = naive.get(((random as u128 * naive.len() as u128) >> 64) as usize).copied();
            prop_assert_eq!(list.draw(&holes, random), expected);
        }
    }
}
