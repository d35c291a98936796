//! The cluster's objects, made from numbers whenever they are asked for: 100,000 pods as text would take more memory than
//! what is measured.
//!
//! A pod has about 6 kB, as pods of real clusters do, two thirds of which no mesh reads.

use std::fmt::Write;

/// Pods of one service, and endpoints of its slice.
pub const PODS_A_SERVICE: u32 = 100;
/// Services of one namespace.
const SERVICES_A_NAMESPACE: u32 = 50;

/// How large a cluster is.
#[derive(Clone, Copy, Debug)]
pub struct Size {
    /// Pods.
    pub pods: u32,
    /// Nodes.
    pub nodes: u32,
}

impl Size {
    /// Services.
    pub fn services(self) -> u32 {
        self.pods.div_ceil(PODS_A_SERVICE)
    }

    /// Namespaces with pods.
    pub fn namespaces(self) -> u32 {
        self.services().div_ceil(SERVICES_A_NAMESPACE)
    }
}

/// A pod: a place in the cluster, and how often it was taken anew.
#[derive(Clone, Copy, Debug)]
pub struct Pod {
    /// Its place; says its service and its node.
    pub place: u32,
    /// Which of the pods at this place it is.
    pub incarnation: u32,
    /// Whether it has an address and is ready.
    pub running: bool,
}

/// The namespace of a service.
pub fn namespace_of(service: u32) -> String {
    format!("team-{}", service / SERVICES_A_NAMESPACE)
}

impl Pod {
    /// Its service.
    pub fn service(self) -> u32 {
        self.place / PODS_A_SERVICE
    }

    /// Its namespace.
    pub fn namespace(self) -> String {
        namespace_of(self.service())
    }

    /// Its name.
    pub fn name(self) -> String {
        format!("app-{}-5f6d8c9b7-{:05x}{:03x}", self.service(), self.place, self.incarnation % 4096)
    }

    /// The name of what proxies are told of it.
    pub fn resource(self) -> String {
        format!("Kubernetes//Pod/{}/{}", self.namespace(), self.name())
    }

    /// Its address: the next pod at the place has another.
    pub fn address(self) -> String {
        let number = self.place * 2 + self.incarnation % 2;
        format!("10.{}.{}.{}", 16 + (number >> 16), (number >> 8) & 255, number & 255)
    }

    fn node(self, size: Size) -> String {
        node_name(self.place % size.nodes)
    }

    /// It as the API server has it.
    pub fn json(self, size: Size, version: u64) -> String {
        let (namespace, name, service) = (self.namespace(), self.name(), self.service());
        let (address, node) = (self.address(), self.node(size));
        let mut text = String::with_capacity(7000);
        // Writing to a String can't fail.
        let _ = write!(
            text,
            r#"{{"apiVersion":"v1","kind":"Pod","metadata":{{"name":"{name}","generateName":"app-{service}-5f6d8c9b7-","namespace":"{namespace}","uid":"b0a6a0a8-{:04x}-4222-8333-{:012x}","resourceVersion":"{version}","creationTimestamp":"2026-11-21T08:00:00Z","labels":{{"app":"app-{service}","version":"v1","pod-template-hash":"5f6d8c9b7"}},"annotations":{{"ambient.istio.io/redirection":"enabled","prometheus.io/scrape":"true"}},"ownerReferences":[{{"apiVersion":"apps/v1","kind":"ReplicaSet","name":"app-{service}-5f6d8c9b7","uid":"5b0c3ad4-0000-4000-8000-{service:012x}","controller":true,"blockOwnerDeletion":true}}],"managedFields":["#,
            self.incarnation & 0xffff,
            self.place,
        );
        managed_fields(&mut text);
        let _ = write!(
            text,
            r#"]}},"spec":{{"nodeName":"{node}","serviceAccountName":"app-{service}","serviceAccount":"app-{service}","restartPolicy":"Always","dnsPolicy":"ClusterFirst","schedulerName":"default-scheduler","priority":0,"enableServiceLinks":true,"preemptionPolicy":"PreemptLowerPriority","securityContext":{{}},"terminationGracePeriodSeconds":30,"volumes":[{{"name":"kube-api-access","projected":{{"defaultMode":420,"sources":[{{"serviceAccountToken":{{"expirationSeconds":3607,"path":"token"}}}},{{"configMap":{{"name":"kube-root-ca.crt","items":[{{"key":"ca.crt","path":"ca.crt"}}]}}}}]}}}}],"containers":[{{"name":"app","image":"registry.example/team/app:1.2.3","ports":[{{"name":"http","containerPort":8080,"protocol":"TCP"}}],"env":["#
        );
        for index in 0..12 {
            let comma = if index > 0 { "," } else { "" };
            let _ = write!(
                text,
                r#"{comma}{{"name":"SETTING_{index}","value":"a value as long as they often are {index}"}}"#
            );
        }
        let _ = write!(
            text,
            r#"],"resources":{{"limits":{{"cpu":"1","memory":"512Mi"}},"requests":{{"cpu":"100m","memory":"128Mi"}}}},"readinessProbe":{{"httpGet":{{"path":"/ready","port":"http","scheme":"HTTP"}},"periodSeconds":10}},"volumeMounts":[{{"name":"kube-api-access","readOnly":true,"mountPath":"/var/run/secrets/kubernetes.io/serviceaccount"}}],"terminationMessagePath":"/dev/termination-log","imagePullPolicy":"IfNotPresent"}}],"tolerations":[{{"key":"node.kubernetes.io/not-ready","operator":"Exists","effect":"NoExecute","tolerationSeconds":300}},{{"key":"node.kubernetes.io/unreachable","operator":"Exists","effect":"NoExecute","tolerationSeconds":300}}]}},"status":{{"#
        );
        if self.running {
            let _ = write!(
                text,
                r#""phase":"Running","hostIP":"{}","podIP":"{address}","podIPs":[{{"ip":"{address}"}}],"startTime":"2026-11-21T08:00:00Z","conditions":[{{"type":"Initialized","status":"True","lastTransitionTime":"2026-11-21T08:00:00Z"}},{{"type":"Ready","status":"True","lastTransitionTime":"2026-11-21T08:00:05Z"}},{{"type":"ContainersReady","status":"True","lastTransitionTime":"2026-11-21T08:00:05Z"}},{{"type":"PodScheduled","status":"True","lastTransitionTime":"2026-11-21T08:00:00Z"}}],"containerStatuses":[{{"name":"app","ready":true,"restartCount":0,"image":"registry.example/team/app:1.2.3","imageID":"registry.example/team/app@sha256:6e0b1d4f9c1c0c6ab7a2c0a6a5a8b5e0c6a7d8e9f0a1b2c3d4e5f60718293a4b","containerID":"containerd://6e0b1d4f9c1c0c6ab7a2c0a6a5a8b5e0c6a7d8e9f0a1b2c3d4e5f6{:08x}","state":{{"running":{{"startedAt":"2026-11-21T08:00:02Z"}}}},"started":true}}],"qosClass":"Burstable"}}}}"#,
                node_address(self.place % size.nodes),
                self.place,
            );
        } else {
            text.push_str(r#""phase":"Pending","qosClass":"Burstable"}}"#);
        }
        text
    }
}

/// What the API server keeps of who wrote which field.
fn managed_fields(text: &mut String) {
    for (index, manager) in ["kube-controller-manager", "culvert-node", "kubelet"].iter().enumerate() {
        let comma = if index > 0 { "," } else { "" };
        let _ = write!(
            text,
            r#"{comma}{{"manager":"{manager}","operation":"Update","apiVersion":"v1","time":"2026-11-21T08:00:05Z","fieldsType":"FieldsV1","fieldsV1":{{"f:metadata":{{"f:generateName":{{}},"f:labels":{{".":{{}},"f:app":{{}},"f:version":{{}},"f:pod-template-hash":{{}}}},"f:ownerReferences":{{".":{{}}}}}},"f:spec":{{"f:containers":{{"k:{{\"name\":\"app\"}}":{{".":{{}},"f:env":{{".":{{}},"k:{{\"name\":\"SETTING_0\"}}":{{".":{{}},"f:name":{{}},"f:value":{{}}}}}},"f:image":{{}},"f:imagePullPolicy":{{}},"f:ports":{{".":{{}}}},"f:resources":{{".":{{}},"f:limits":{{".":{{}},"f:cpu":{{}},"f:memory":{{}}}}}}}}}}}}}}}}"#
        );
    }
}

/// A node's name.
pub fn node_name(node: u32) -> String {
    format!("node-{node:04}")
}

/// A node's address.
pub fn node_address(node: u32) -> String {
    format!("10.0.{}.{}", node >> 8, node & 255)
}

/// A node.
pub fn node(node: u32, version: u64) -> String {
    let (name, address, zone) = (node_name(node), node_address(node), node % 3);
    format!(
        r#"{{"apiVersion":"v1","kind":"Node","metadata":{{"name":"{name}","uid":"n-{node}","resourceVersion":"{version}","labels":{{"kubernetes.io/hostname":"{name}","topology.kubernetes.io/region":"r1","topology.kubernetes.io/zone":"r1-{zone}"}}}},"spec":{{}},"status":{{"addresses":[{{"type":"InternalIP","address":"{address}"}}],"conditions":[{{"type":"Ready","status":"True"}}]}}}}"#
    )
}

/// The pod of a node's proxy. Its uid is what reviews of its token say.
pub fn proxy(name: &str, namespace: &str, node: u32) -> String {
    let (node, address) = (node_name(node), node_address(node));
    format!(
        r#"{{"apiVersion":"v1","kind":"Pod","metadata":{{"name":"{name}","namespace":"{namespace}","uid":"uid-{name}","resourceVersion":"1","labels":{{"app":"ztunnel"}}}},"spec":{{"nodeName":"{node}","hostNetwork":true,"serviceAccountName":"ztunnel","containers":[{{"name":"ztunnel","image":"ztunnel"}}]}},"status":{{"phase":"Running","hostIP":"{address}","podIP":"{address}","podIPs":[{{"ip":"{address}"}}],"conditions":[{{"type":"Ready","status":"True"}}]}}}}"#
    )
}

/// A namespace of the mesh.
pub fn namespace(name: &str, version: u64) -> String {
    format!(
        r#"{{"apiVersion":"v1","kind":"Namespace","metadata":{{"name":"{name}","uid":"ns-{name}","resourceVersion":"{version}","labels":{{"kubernetes.io/metadata.name":"{name}","istio.io/dataplane-mode":"ambient"}}}},"spec":{{}},"status":{{"phase":"Active"}}}}"#
    )
}

/// The mesh's settings: the defaults.
pub fn settings(namespace: &str) -> String {
    format!(
        r#"{{"apiVersion":"v1","kind":"ConfigMap","metadata":{{"name":"culvert","namespace":"{namespace}","resourceVersion":"1"}},"data":{{"mesh":""}}}}"#
    )
}

/// A service.
pub fn service(service: u32, version: u64) -> String {
    let namespace = namespace_of(service);
    let address = format!("10.96.{}.{}", service >> 8, service & 255);
    format!(
        r#"{{"apiVersion":"v1","kind":"Service","metadata":{{"name":"app-{service}","namespace":"{namespace}","uid":"svc-{service}","resourceVersion":"{version}","creationTimestamp":"2026-11-21T08:00:00Z"}},"spec":{{"type":"ClusterIP","clusterIP":"{address}","clusterIPs":["{address}"],"selector":{{"app":"app-{service}"}},"ports":[{{"name":"http","port":80,"targetPort":"http","protocol":"TCP"}}]}}}}"#
    )
}

/// A service account.
pub fn account(service: u32, version: u64) -> String {
    let namespace = namespace_of(service);
    format!(
        r#"{{"apiVersion":"v1","kind":"ServiceAccount","metadata":{{"name":"app-{service}","namespace":"{namespace}","uid":"sa-{service}","resourceVersion":"{version}"}}}}"#
    )
}

/// A policy of a namespace.
pub fn policy(number: u32, version: u64) -> String {
    let namespace = format!("team-{number}");
    format!(
        r#"{{"apiVersion":"security.istio.io/v1","kind":"AuthorizationPolicy","metadata":{{"name":"only-teams","namespace":"{namespace}","uid":"p-{number}","generation":1,"resourceVersion":"{version}"}},"spec":{{"action":"ALLOW","rules":[{{"from":[{{"source":{{"namespaces":["team-*"]}}}}]}}]}}}}"#
    )
}

/// The slice of a service, of these pods.
pub fn slice(service: u32, pods: &[Pod], size: Size, version: u64) -> String {
    let namespace = namespace_of(service);
    let mut text = format!(
        r#"{{"apiVersion":"discovery.k8s.io/v1","kind":"EndpointSlice","metadata":{{"name":"app-{service}-x2x4z","namespace":"{namespace}","uid":"es-{service}","resourceVersion":"{version}","labels":{{"kubernetes.io/service-name":"app-{service}","endpointslice.kubernetes.io/managed-by":"endpointslice-controller.k8s.io"}},"ownerReferences":[{{"apiVersion":"v1","kind":"Service","name":"app-{service}","uid":"svc-{service}","controller":true}}]}},"addressType":"IPv4","ports":[{{"name":"http","port":8080,"protocol":"TCP"}}],"endpoints":["#
    );
    for (index, pod) in pods.iter().filter(|pod| pod.running).enumerate() {
        let comma = if index > 0 { "," } else { "" };
        let _ = write!(
            text,
            r#"{comma}{{"addresses":["{}"],"conditions":{{"ready":true,"serving":true,"terminating":false}},"nodeName":"{}","targetRef":{{"kind":"Pod","name":"{}","namespace":"{namespace}"}},"zone":"r1-{}"}}"#,
            pod.address(),
            pod.node(size),
            pod.name(),
            (pod.place % size.nodes) % 3,
        );
    }
    text.push_str("]}");
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn objects_are_json() {
        let size = Size { pods: 1000, nodes: 20 };
        let pod = Pod { place: 42, incarnation: 1, running: true };
        let pending = Pod { running: false, ..pod };
        let texts = [
            pod.json(size, 7),
            pending.json(size, 7),
            node(3, 1),
            namespace("a", 1),
            service(2, 1),
            account(2, 1),
            policy(0, 1),
            slice(0, &[pod, pending, pod], size, 3),
            proxy("ztunnel-1", "culvert-system", 1),
        ];
        for text in &texts {
            let value: serde_json::Value = serde_json::from_str(text).unwrap();
            assert!(value["metadata"]["resourceVersion"].is_string(), "{text}");
        }
        assert!((4000..8000).contains(&texts[0].len()), "{}", texts[0].len());
    }
}
