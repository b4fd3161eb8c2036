"""Jobs on clusters of their own on Kubernetes, as RayJobs of KubeRay; `rayjob.yaml` is what they start from."""
