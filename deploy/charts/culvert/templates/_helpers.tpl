{{/* The control plane's name: culvertd, with the revision if it isn't the default one. */}}
{{- define "culvert.controlPlane" -}}
{{- if eq .Values.revision "default" }}culvertd{{ else }}culvertd-{{ .Values.revision }}{{ end -}}
{{- end }}

{{/* Where proxies reach the control plane. */}}
{{- define "culvert.xdsAddress" -}}
{{- .Values.ztunnel.xdsAddress | default (printf "https://%s.%s.svc:15012" (include "culvert.controlPlane" .) .Release.Namespace) -}}
{{- end }}

{{/* Where ztunnel finds the root of who it asks: of our own control plane, unless another is named. */}}
{{- define "culvert.rootConfigMap" -}}
{{- $of := .Values.ztunnel -}}
{{- $of.rootConfigMap | default (ternary "istio-ca-root-cert" "culvert-ca-root-cert" (or $of.xdsAddress $of.caAddress | empty | not)) -}}
{{- end }}

{{/* The ConfigMap with the mesh's settings, and the revision's tags. */}}
{{- define "culvert.settings" -}}
{{- if eq .Values.revision "default" }}culvert{{ else }}culvert-{{ .Values.revision }}{{ end -}}
{{- end }}

{{/* What the control plane's webhooks have in common: call with (list . "/path"). */}}
{{- define "culvert.webhook" -}}
{{- $root := index . 0 -}}
clientConfig:
  service:
    name: {{ include "culvert.controlPlane" $root }}
    namespace: {{ $root.Release.Namespace }}
    path: {{ index . 1 }}
    port: 443
sideEffects: None
admissionReviewVersions: [v1]
{{- end }}

{{/* Which objects are a revision's: call with (list . "In") for those that name it or a tag of it, which the control plane
keeps up to date, and with (list . "DoesNotExist") for those that name none. */}}
{{- define "culvert.revisionSelector" -}}
{{- $root := index . 0 -}}
{{- $map := lookup "v1" "ConfigMap" $root.Release.Namespace (include "culvert.settings" $root) | default dict -}}
{{- $tags := (get ($map.data | default dict) "revisionTags") | default "" | splitList "," -}}
matchExpressions:
  - key: istio.io/rev
    operator: {{ index . 1 }}
    {{- if eq (index . 1) "In" }}
    values: {{ prepend (compact $tags) $root.Values.revision | uniq | sortAlpha | toJson }}
    {{- end }}
{{- end }}

{{/* An image: call with (list . "culvertd"). */}}
{{- define "culvert.image" -}}
{{- $root := index . 0 -}}
{{ $root.Values.image.repository }}/{{ index . 1 }}:{{ $root.Values.image.tag | default $root.Chart.AppVersion }}
{{- end }}

{{/* Labels of every object: call with (list . "culvertd"). */}}
{{- define "culvert.labels" -}}
{{- $root := index . 0 -}}
app: {{ index . 1 }}
app.kubernetes.io/name: {{ index . 1 }}
app.kubernetes.io/part-of: culvert
app.kubernetes.io/instance: {{ $root.Release.Name }}
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
helm.sh/chart: {{ $root.Chart.Name }}-{{ $root.Chart.Version }}
istio.io/rev: {{ $root.Values.revision }}
{{- end }}

{{/* Environment variables from a map of names and values. */}}
{{- define "culvert.env" -}}
{{- range $name, $value := . }}
- name: {{ $name }}
  value: {{ $value | quote }}
{{- end }}
{{- end }}

{{/* A variable from a field of the pod: call with (list "NODE_NAME" "spec.nodeName"). */}}
{{- define "culvert.field" -}}
- name: {{ index . 0 }}
  valueFrom:
    fieldRef:
      fieldPath: {{ index . 1 }}
{{- end }}

{{- define "culvert.pullSecrets" -}}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
{{- range . }}
  - name: {{ . }}
{{- end }}
{{- end }}
{{- end }}

{{/* What SELinux lets reach into the node, as part of a security context. */}}
{{- define "culvert.seLinux" -}}
{{- with .Values.node.seLinuxType -}}
seLinuxOptions:
  type: {{ . }}
{{- end }}
{{- end }}

{{/* What waypoints are to have otherwise: the registry's credentials, and what the values say. */}}
{{- define "culvert.waypointOverrides" -}}
{{- $overrides := deepCopy .Values.waypoint.overrides -}}
{{- with .Values.image.pullSecrets -}}
{{- $secrets := list -}}
{{- range . }}{{ $secrets = append $secrets (dict "name" .) }}{{ end -}}
{{- $pod := dict "spec" (dict "imagePullSecrets" $secrets) -}}
{{- $overrides = mergeOverwrite (dict "deployment" (dict "spec" (dict "template" $pod))) $overrides -}}
{{- end -}}
{{- toJson $overrides -}}
{{- end }}
