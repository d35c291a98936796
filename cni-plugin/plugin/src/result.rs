//! The result of the plugin before, which is ours too: passed on as it is, in the form of the configuration's version
//! (CNI specification, section 5 "Success", and its list of changes between versions).

use std::net::IpAddr;

use serde_json::{Map, Value, json};

use crate::error::{CniError, Code};

/// What 1.1.0 has and older versions don't.
const NEW_IN_INTERFACES: [&str; 3] = ["mtu", "socketPath", "pciID"];
const NEW_IN_ROUTES: [&str; 5] = ["mtu", "advmss", "priority", "table", "scope"];

/// `previous` in the form of `version`.
pub fn in_version(previous: Value, version: &str) -> Result<Value, CniError> {
    let Value::Object(mut result) = previous else { return Err(malformed("it is no JSON object")) };
    let from = match result.get("cniVersion") {
        None | Some(Value::Null) => version.to_owned(),
        Some(Value::String(from)) => from.clone(),
        Some(_) => return Err(malformed("its cniVersion is no string")),
    };
    if from != version {
        if !["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"].contains(&&*from) {
            let message = format!("the plugin before has answered in version {from:?}");
            return Err(CniError::new(Code::IncompatibleVersion, message)
                .details("let it answer in the version of its configuration, 0.3.1 or later"));
        }
        convert(&mut result, version)?;
    }
    result.insert("cniVersion".to_owned(), version.into());
    Ok(Value::Object(result))
}

/// Between 0.3 and 0.4 nothing changed, 1.0 left out the `version` of addresses, 1.1 has more fields.
fn convert(result: &mut Map<String, Value>, version: &str) -> Result<(), CniError> {
    let with_family = version.starts_with("0.");
    for ip in items(result, "ips")? {
        if with_family {
            let family = if address_of(ip)?.is_ipv4() { "4" } else { "6" };
            ip.insert("version".to_owned(), family.into());
        } else {
            ip.remove("version");
        }
    }
    if version != crate::network::NEWEST {
        for (list, names) in [("interfaces", &NEW_IN_INTERFACES[..]), ("routes", &NEW_IN_ROUTES[..])] {
            for item in items(result, list)? {
                item.retain(|name, _| !names.contains(&name.as_str()));
            }
        }
    }
    Ok(())
}

/// The pod's addresses in a result, in the form that agents are told them: `{"Interface": 1, "Address": {"IP": "10.1.2.3",
/// "Mask": "////AA=="}}`.
pub fn addresses(result: &mut Value) -> Result<Vec<Value>, CniError> {
    let Value::Object(result) = result else { return Err(malformed("it is no JSON object")) };
    let mut found = Vec::new();
    for ip in items(result, "ips")? {
        let address = address_of(ip)?;
        let text = ip.get("address").and_then(Value::as_str).unwrap_or_default();
        let bits = text.split_once('/').and_then(|(_, bits)| bits.parse::<u32>().ok());
        let all = if address.is_ipv4() { 32 } else { 128 };
        let bits =
            bits.filter(|bits| *bits <= all).ok_or_else(|| malformed("an address without its length"))?;
        let mask: Vec<u8> = (0..all / 8).map(|byte| mask_byte(bits.saturating_sub(byte * 8))).collect();
        found.push(json!({
            "Interface": ip.get("interface").cloned().unwrap_or(Value::Null),
            "Address": { "IP": address.to_string(), "Mask": base64(&mask) },
        }));
    }
    Ok(found)
}

/// The objects in a list of the result; none when there is no such list.
fn items<'r>(
    result: &'r mut Map<String, Value>,
    list: &str,
) -> Result<Vec<&'r mut Map<String, Value>>, CniError> {
    match result.get_mut(list) {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::Array(items)) => items
            .iter_mut()
            .map(|item| {
                item.as_object_mut().ok_or_else(|| malformed(&format!("an item of {list} is no object")))
            })
            .collect(),
        Some(_) => Err(malformed(&format!("its {list} are no list"))),
    }
}

fn address_of(ip: &Map<String, Value>) -> Result<IpAddr, CniError> {
    let text = ip.get("address").and_then(Value::as_str).unwrap_or_default();
    let address = text.split_once('/').map_or(text, |(address, _)| address);
    address.parse().map_err(|_| malformed(&format!("{text:?} is no address")))
}

fn malformed(what: &str) -> CniError {
    CniError::new(
        Code::InvalidNetwork,
        format!("the result of the plugin before (prevResult) is malformed: {what}"),
    )
}

/// The byte of a mask in which `bits` more are set, at most all.
fn mask_byte(bits: u32) -> u8 {
    match bits {
        0 => 0,
        1..=7 => u8::MAX << (8 - bits),
        _ => u8::MAX,
    }
}

/// RFC 4648 section 4.
fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for group in bytes.chunks(3) {
        let bits = (0..3).fold(0_u32, |bits, at| bits << 8 | u32::from(*group.get(at).unwrap_or(&0)));
        for at in 0..4 {
            let index = usize::try_from(bits >> (18 - 6 * at) & 63).unwrap_or_default();
            let symbol = ALPHABET.get(index).copied().filter(|_| at <= group.len());
            text.push(symbol.map_or('=', char::from));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_are_what_go_writes() {
        assert_eq!(base64(&[255, 255, 255, 0]), "////AA==");
        assert_eq!(base64(b"a"), "YQ==");
        assert_eq!(base64(b"ab"), "YWI=");
        assert_eq!(base64(b"abc"), "YWJj");
        let mask =
            |bits: u32| (0..4).map(|byte| mask_byte(bits.saturating_sub(byte * 8))).collect::<Vec<_>>();
        assert_eq!(mask(24), [255, 255, 255, 0]);
        assert_eq!(mask(25), [255, 255, 255, 128]);
        assert_eq!(mask(0), [0; 4]);
        assert_eq!(mask(32), [255; 4]);
    }

    #[test]
    fn the_same_version_passes_unchanged() {
        let result = json!({ "cniVersion": "0.4.0", "ips": [{ "version": "4", "address": "10.0.0.2/24" }],
                             "dns": {}, "of-a-vendor": [1, "x"] });
        assert_eq!(in_version(result.clone(), "0.4.0").unwrap(), result);
        let bare = json!({ "ips": [] });
        assert_eq!(in_version(bare, "1.0.0").unwrap(), json!({ "ips": [], "cniVersion": "1.0.0" }));
    }

    #[test]
    fn versions_are_converted_both_ways() {
        let new = json!({
            "cniVersion": "1.1.0",
            "interfaces": [{ "name": "eth0", "mtu": 1500, "sandbox": "/run/netns/x" }],
            "ips": [{ "address": "10.0.0.2/24", "interface": 0 }, { "address": "fd00::2/64" }],
            "routes": [{ "dst": "0.0.0.0/0", "mtu": 1400, "gw": "10.0.0.1" }],
        });
        let old = json!({
            "cniVersion": "0.3.1",
            "interfaces": [{ "name": "eth0", "sandbox": "/run/netns/x" }],
            "ips": [{ "address": "10.0.0.2/24", "interface": 0, "version": "4" },
                    { "address": "fd00::2/64", "version": "6" }],
            "routes": [{ "dst": "0.0.0.0/0", "gw": "10.0.0.1" }],
        });
        assert_eq!(in_version(new.clone(), "0.3.1").unwrap(), old);
        let middle = in_version(old, "1.0.0").unwrap();
        assert_eq!(middle["ips"], new["ips"]);
        assert_eq!(in_version(new, "1.0.0").unwrap(), middle);
        assert!(in_version(json!({ "cniVersion": "0.2.0", "ip4": {} }), "1.0.0").is_err());
    }

    #[test]
    fn what_is_malformed_is_said() {
        for bad in [
            json!([]),
            json!({ "cniVersion": 1 }),
            json!({ "cniVersion": "0.4.0", "ips": [{ "address": "x" }] }),
            json!({ "cniVersion": "0.4.0", "ips": {} }),
            json!({ "cniVersion": "0.4.0", "ips": ["10.0.0.1/8"] }),
        ] {
            let error = in_version(bad.clone(), "0.3.1").unwrap_err();
            assert!(error.to_json(None).contains("\"code\":7"), "{bad}");
        }
        let mut result = json!({ "ips": [{ "address": "10.0.0.2/24" }, { "address": "fd00::2/64" }] });
        let found = addresses(&mut result).unwrap();
        assert_eq!(
            found[0],
            json!({ "Interface": null, "Address": { "IP": "10.0.0.2", "Mask": "////AA==" } })
        );
        assert_eq!(found[1]["Address"]["IP"], "fd00::2");
        for bad in ["10.0.0.2", "10.0.0.2/33", "10.0.0.2/x"] {
            assert!(addresses(&mut json!({ "ips": [{ "address": bad }] })).is_err(), "{bad}");
        }
    }

    /// JSON of the kind that plugins answer, right and wrong.
    fn results() -> impl proptest::strategy::Strategy<Value = Value> {
        use proptest::prelude::*;
        let text = proptest::sample::select(vec!["10.0.0.2/24", "fd00::2/64", "x", "1.1.0", "0.3.1", "/"]);
        let leaf =
            prop_oneof![Just(Value::Null), any::<i64>().prop_map(Value::from), text.prop_map(Value::from)];
        let names =
            proptest::sample::select(vec!["ips", "address", "version", "cniVersion", "routes", "mtu"]);
        leaf.prop_recursive(4, 32, 4, move |inner| {
            let object = proptest::collection::vec((names.clone(), inner.clone()), 0..5);
            let object =
                object.prop_map(|fields| fields.into_iter().map(|(k, v)| (k.to_owned(), v)).collect());
            prop_oneof![
                proptest::collection::vec(inner, 0..4).prop_map(Value::Array),
                object.prop_map(Value::Object)
            ]
        })
    }

    proptest::proptest! {
        #[test]
        fn any_result_is_converted_or_refused(result in results()) {
            for version in crate::network::VERSIONS {
                if let Ok(mut converted) = in_version(result.clone(), version) {
                    assert_eq!(converted["cniVersion"], version);
                    assert_eq!(in_version(converted.clone(), version).unwrap(), converted);
                    let _ = addresses(&mut converted);
                }
            }
        }
    }
}
