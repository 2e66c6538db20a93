package redfour

// What Redis is sent, for tests of the scripts alone.
var (
	AcquireScript = acquireScript.source
	LeaveScript   = leaveScript.source
	ReleaseScript = releaseScript.source
	RenewScript   = renewScript.source
)
