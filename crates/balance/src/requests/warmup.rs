//! How much of its share an endpoint gets that has not been there for long.

use std::time::Duration;

use model::http::Warmup;

/// The part of its share that an endpoint of this age gets, above 0 and up to 1 (Envoy's slow start).
#[must_use]
pub fn share(warmup: &Warmup, age: Duration) -> f64 {
    if age >= warmup.duration || warmup.duration.is_zero() {
        return 1.0;
    }
    let part = (age.as_secs_f64() / warmup.duration.as_secs_f64()).max(0.0);
    let grown = part.powf(1.0 / warmup.aggression.max(1.0e-3));
    grown.max(warmup.minimum_percent / 100.0).clamp(1.0e-3, 1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_grows_from_the_least_to_all() {
        let of = |aggression, seconds| {
            let warmup = Warmup { duration: Duration::from_secs(100), minimum_percent: 10.0, aggression };
            (share(&warmup, Duration::from_secs(seconds)) * 100.0).round() as u32
        };
        assert_eq!([0, 5, 50, 99, 100, 200].map(|age| of(1.0, age)), [10, 10, 50, 99, 100, 100]);
        // 0.25 to the power of a half is a half.
        assert_eq!([0, 25].map(|age| of(2.0, age)), [10, 50]);
    }
}
