//! Ranges of addresses, as users write them.

use std::net::IpAddr;

/// Whether an address is in a range as `10.0.0.0/8`.
pub fn is_within(range: &str, ip: IpAddr) -> bool {
    let Some((start, bits)) = range.split_once('/') else { return false };
    let (Ok(start), Ok(bits)) = (start.parse::<IpAddr>(), bits.parse::<u32>()) else { return false };
    let number = |ip: IpAddr| match ip {
        IpAddr::V4(ip) => (u128::from(ip.to_bits()) << 96, 32),
        IpAddr::V6(ip) => (ip.to_bits(), 128),
    };
    let ((start, length), (ip, length_of_ip)) = (number(start), number(ip));
    let differ = (start ^ ip).leading_zeros();
    length == length_of_ip && bits <= length && differ >= bits
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_in_the_ranges_that_begin_as_it_does() {
        let within = |range: &str, ip: &str| is_within(range, ip.parse().unwrap());
        for (range, ip) in [
            ("10.0.0.0/8", "10.1.2.3"),
            ("10.1.2.3/32", "10.1.2.3"),
            ("0.0.0.0/0", "10.1.2.3"),
            ("fd00::/8", "fd12::1"),
            ("::/0", "fd12::1"),
        ] {
            assert!(within(range, ip), "{range} {ip}");
        }
        for (range, ip) in [
            ("10.0.0.0/8", "11.0.0.1"),
            ("0.0.0.0/0", "fd12::1"),
            ("::/0", "10.1.2.3"),
            ("10.0.0.0/33", "10.0.0.0"),
            ("10.0.0.0", "10.0.0.0"),
            ("x/8", "10.0.0.0"),
        ] {
            assert!(!within(range, ip), "{range} {ip}");
        }
    }
}
