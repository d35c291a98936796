//! What a waypoint is told, from resources to steps of the model.
//!
//! Of what can't be read the last good version stays in force. Where there is none: a policy, a token's rule, a limit or an
//! authorizer that is named and not known refuses; a service of which nothing is known is not served; and requests to a
//! destination of which what is said can't be read are refused ([`refusing`]), since by the defaults they might go in
//! plaintext where TLS was asked for.

use std::sync::Arc;

use ::xds::client::Resource;
use model::http::{ConnectionPool, ServiceTraffic, TrafficPolicy};
use model::{Change, Mesh, PolicyKey, ServiceKey};
use proto::{
    AUTHENTICATION_TYPE_URL, AUTHORIZER_TYPE_URL, DecodeError, Decoder, HTTP_POLICY_TYPE_URL,
    HTTP_SERVICE_TYPE_URL, RATE_LIMIT_TYPE_URL, TRAFFIC_TYPE_URL, waypoint_part,
};

/// What a resource comes to: the step, if there is one, and why it is refused, if it is.
#[derive(Debug)]
pub(crate) struct Read {
    pub(crate) change: Option<Change>,
    pub(crate) refusal: Option<String>,
}

/// Reads a resource of a type that waypoints are told; `None` for another type.
pub(crate) fn read(decoder: &mut Decoder, mesh: &Mesh, type_url: &str, resource: &Resource) -> Option<Read> {
    let bytes = &*resource.body;
    let read = match type_url {
        HTTP_SERVICE_TYPE_URL => of(
            resource,
            decoder.http_service(bytes),
            |s| s.service.to_string(),
            |s| Change::SetHttpService(s.into()),
        ),
        HTTP_POLICY_TYPE_URL => of(
            resource,
            decoder.http_policy(bytes),
            |p| p.key.to_string(),
            |p| Change::SetHttpPolicy(p.into()),
        ),
        TRAFFIC_TYPE_URL => {
            of(resource, decoder.traffic(bytes), |t| t.service.to_string(), |t| Change::SetTraffic(t.into()))
        }
        AUTHENTICATION_TYPE_URL => {
            let read = decoder.authentication(bytes);
            of(resource, read, |a| a.key.to_string(), |a| Change::SetAuthentication(a.into()))
        }
        RATE_LIMIT_TYPE_URL => {
            let read = decoder.rate_limit(bytes);
            of(resource, read, |limit| limit.key.to_string(), |limit| Change::SetRateLimit(limit.into()))
        }
        AUTHORIZER_TYPE_URL => {
            let read = decoder.authorizer(bytes);
            of(resource, read, |a| a.name.to_string(), |a| Change::SetAuthorizer(a.into()))
        }
        _ => return None,
    };
    Some(match read {
        Ok(change) => Read { change: Some(change), refusal: None },
        Err(reason) if type_url == TRAFFIC_TYPE_URL => unread_traffic(mesh, resource, reason),
        Err(reason) => Read { change: None, refusal: Some(reason) },
    })
}

/// What is removed later is removed by the resource's name, so that must be the object's, behind that of the waypoint.
fn of<T>(
    resource: &Resource,
    read: Result<T, DecodeError>,
    name: impl Fn(&T) -> String,
    change: impl Fn(T) -> Change,
) -> Result<Change, String> {
    let read = read.map_err(|error| error.to_string())?;
    let name = name(&read);
    if waypoint_part(&resource.name) != Some(&*name) {
        return Err(format!("it holds {name:?}, and is named {:?}", resource.name));
    }
    Ok(change(read))
}

fn unread_traffic(mesh: &Mesh, resource: &Resource, reason: String) -> Read {
    let key = waypoint_part(&resource.name).and_then(service_key);
    match key.filter(|key| mesh.traffic(key).is_none()) {
        Some(key) => {
            let reason = format!("{reason}. Until it can be read, requests to {key} are refused");
            Read { change: Some(Change::SetTraffic(Arc::new(refusing(key)))), refusal: Some(reason) }
        }
        None => Read { change: None, refusal: Some(reason) },
    }
}

/// What stands for what is said of a service and can't be read: no request goes there.
fn refusing(service: ServiceKey) -> ServiceTraffic {
    let pool =
        ConnectionPool { max_requests: Some(0), max_connections: Some(0), ..ConnectionPool::default() };
    let default = TrafficPolicy { pool, ..TrafficPolicy::default() };
    ServiceTraffic { service, default, ports: Box::default(), subsets: Box::default() }
}

/// The step that follows when a resource is gone; `None` for another type, or no name of one.
pub(crate) fn removed(type_url: &str, name: &str) -> Option<Change> {
    let name = waypoint_part(name)?;
    Some(match type_url {
        HTTP_SERVICE_TYPE_URL => Change::RemoveHttpService(service_key(name)?),
        HTTP_POLICY_TYPE_URL => Change::RemoveHttpPolicy(policy_key(name)?),
        TRAFFIC_TYPE_URL => Change::RemoveTraffic(service_key(name)?),
        AUTHENTICATION_TYPE_URL => Change::RemoveAuthentication(policy_key(name)?),
        RATE_LIMIT_TYPE_URL => Change::RemoveRateLimit(policy_key(name)?),
        AUTHORIZER_TYPE_URL => Change::RemoveAuthorizer(name.into()),
        _ => return None,
    })
}

fn service_key(name: &str) -> Option<ServiceKey> {
    let (namespace, hostname) = name.split_once('/')?;
    Some(ServiceKey { namespace: namespace.into(), hostname: hostname.into() })
}

fn policy_key(name: &str) -> Option<PolicyKey> {
    let (namespace, name) = name.split_once('/')?;
    Some(PolicyKey { namespace: namespace.into(), name: name.into() })
}

#[cfg(test)]
mod tests {
    use prost::Message;
    use proto::wire::waypoint as wire;

    use super::*;

    fn traffic(unknown: &[u8]) -> Vec<u8> {
        let service = wire::ServiceKey { namespace: "shop".into(), hostname: "pay".into() };
        let balancer = wire::load_balancer::Kind::Random(());
        let policy = wire::TrafficPolicy {
            load_balancer: Some(wire::LoadBalancer { kind: Some(balancer) }),
            pool: Some(wire::ConnectionPool::default()),
            ..Default::default()
        };
        let message =
            wire::ServiceTraffic { service: Some(service), default: Some(policy), ..Default::default() };
        [&message.encode_to_vec(), unknown].concat()
    }

    fn resource(name: &str, body: Vec<u8>) -> Resource {
        Resource { name: name.into(), version: "1".to_owned(), aliases: Vec::new(), body: body.into() }
    }

    #[test]
    fn what_is_said_of_a_destination_and_not_understood_refuses_or_stays_as_it_was() {
        let mut decoder = Decoder::default();
        let newer = [0xf8, 0x3f, 0x01];
        let mesh = Mesh::default();
        let mut read =
            |mesh: &Mesh, resource: &Resource| read(&mut decoder, mesh, TRAFFIC_TYPE_URL, resource).unwrap();
        let bad = read(&mesh, &resource("shop/w/shop/pay", traffic(&newer)));
        let reason = bad.refusal.unwrap();
        assert!(reason.contains("newer") && reason.contains("requests to shop/pay are refused"), "{reason}");
        let Some(Change::SetTraffic(instead)) = bad.change else { panic!("nothing stands for it") };
        assert_eq!(instead.policy(80, Some("v1")).pool.max_requests, Some(0));

        let good = read(&mesh, &resource("shop/w/shop/pay", traffic(&[])));
        assert!(good.refusal.is_none());
        let mesh = mesh.apply(good.change);
        let bad = read(&mesh, &resource("shop/w/shop/pay", traffic(&newer)));
        assert!(bad.change.is_none() && bad.refusal.is_some(), "the last good version stays");
    }

    #[test]
    fn a_resource_is_what_its_name_says() {
        let mut decoder = Decoder::default();
        let mut refusal = |type_url, name: &str, body: Vec<u8>| {
            read(&mut decoder, &Mesh::default(), type_url, &resource(name, body)).unwrap().refusal
        };
        let said = refusal(TRAFFIC_TYPE_URL, "shop/w/shop/cart", traffic(&[])).unwrap();
        assert!(said.contains("it holds \"shop/pay\", and is named \"shop/w/shop/cart\""), "{said}");
        assert!(refusal(TRAFFIC_TYPE_URL, "shop/pay", traffic(&[])).is_some(), "no waypoint's");
        assert!(refusal(HTTP_SERVICE_TYPE_URL, "shop/w/shop/pay", vec![0xff]).is_some());
        assert!(read(&mut decoder, &Mesh::default(), "another", &resource("a", Vec::new())).is_none());
        assert!(matches!(
            removed(HTTP_POLICY_TYPE_URL, "shop/w/shop/p"),
            Some(Change::RemoveHttpPolicy(key)) if key.to_string() == "shop/p"
        ));
        assert!(removed(HTTP_POLICY_TYPE_URL, "shop/p").is_none());
    }
}
