//! Events of the API server, in which there are two kinds: older reporters write `lastTimestamp`, those that use
//! `events.k8s.io`, as the node agent does, `eventTime`, and for what happens again the time of the last of its `series`.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use serde_json::Value;

/// Where the time of an event may be, the one that counts first.
const TIMES: [&str; 4] =
    ["/series/lastObservedTime", "/lastTimestamp", "/eventTime", "/metadata/creationTimestamp"];

/// The event that happened last, whoever reported it.
pub fn newest<'v>(events: impl IntoIterator<Item = &'v Value>) -> Option<&'v Value> {
    let time = |event: &Value| {
        let read = |path: &&str| serde_json::from_value::<MicroTime>(event.pointer(path)?.clone()).ok();
        TIMES.iter().find_map(read).map(|time| time.0)
    };
    events.into_iter().max_by_key(|event| time(event))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_newest_is_so_by_its_own_kind_of_time() {
        let old = json!({"message": "old", "lastTimestamp": "2026-11-22T10:00:05Z", "eventTime": null});
        let new =
            json!({"message": "new", "lastTimestamp": null, "eventTime": "2026-11-22T10:00:05.500000Z"});
        let again = json!({"message": "again", "lastTimestamp": null, "eventTime": "2026-11-22T09:00:00.000000Z",
                           "series": {"count": 2, "lastObservedTime": "2026-11-22T10:00:06.000000Z"}});
        let said = |events: &[&Value]| newest(events.iter().copied()).map(|e| e["message"].clone());
        assert_eq!(said(&[&new, &old]), Some("new".into()));
        assert_eq!(said(&[&again, &new, &old]), Some("again".into()));
        assert_eq!(said(&[&old, &json!({"message": "untold"})]), Some("old".into()));
        assert_eq!(said(&[]), None);
    }
}
