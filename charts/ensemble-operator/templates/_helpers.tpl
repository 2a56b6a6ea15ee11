{{/* Name of the Deployment, and prefix of the others' names; a Service's begins with a letter and has no dot. */}}
{{- define "ensemble-operator.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- $release := .Release.Name | replace "." "-" -}}
{{- $whole := ternary $release (printf "%s-%s" $release $name) (contains $name $release) -}}
{{- if regexMatch "^[0-9]" $release }}{{ $whole = printf "%s-%s" $name $release }}{{ end -}}
{{- default $whole .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- end }}

{{/* Name of objects without a namespace: several releases may be in one cluster. */}}
{{- define "ensemble-operator.cluster-name" -}}
{{- printf "%s-%s" .Release.Namespace (include "ensemble-operator.fullname" .) -}}
{{- end }}

{{- define "ensemble-operator.selector" -}}
app.kubernetes.io/name: ensemble-operator
app.kubernetes.io/instance: {{ .Release.Name | quote }}
app.kubernetes.io/component: operator
{{- end }}

{{- define "ensemble-operator.labels" -}}
app.kubernetes.io/name: ensemble-operator
app.kubernetes.io/instance: {{ .Release.Name | quote }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{- define "ensemble-operator.service-account" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "ensemble-operator.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- required "serviceAccount.name is needed with serviceAccount.create=false" .Values.serviceAccount.name -}}
{{- end -}}
{{- end }}

{{- define "ensemble-operator.pull-secret-names" -}}
{{- range $index, $secret := .Values.images.pullSecrets }}{{ ternary "," "" (gt $index 0) }}{{ $secret.name }}{{ end -}}
{{- end }}

{{/* The reference of one of our images: `list . "operator"`. */}}
{{- define "ensemble-operator.image" -}}
{{- $root := index . 0 -}}
{{- $image := index $root.Values.images (index . 1) -}}
{{- $name := printf "%s/%s" (trimSuffix "/" $root.Values.images.registry) $image.repository | trimPrefix "/" -}}
{{- if $image.digest -}}
{{- printf "%s@%s" $name $image.digest -}}
{{- else -}}
{{- printf "%s:%s" $name (default $root.Chart.AppVersion $root.Values.images.tag) -}}
{{- end -}}
{{- end }}
