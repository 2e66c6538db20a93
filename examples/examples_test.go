package examples_test

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"slices"
	"testing"
)

// programs says how often each prints what it is about.
var programs = map[string]map[string]int{
	"cronjob": {
		"makes the report":                3,
		"made it; the lease runs out in ": 3,
		"done elsewhere: host-":           6,
		"3 hosts, 3 reports":              1,
	},
	"fencedredis": {
		`ended the lease of "stuck"`:                                          1,
		"goes on, and writes: written under a later lease already":            1,
		`is told by a renewal: redfour: keep alive "token:42": lease expired`: 1,
		"The late write changed nothing.":                                     1,
	},
	"fencedsql": {
		"1 row changed": 1,
		"wakes up, and writes: 0 rows changed: written under a later lease already": 1,
		"does not exist: no such token":                                             1,
		`releases: redfour: release "token:42": lease expired`:                      1,
		"The late write changed nothing.":                                           1,
	},
	"handoff": {
		"orders report 42: 202 Accepted\n":                        2,
		"orders report 42: 409 Conflict, ordered already":         2,
		"finds it ordered already, from web-1":                    2,
		"orders report 43: 503":                                   1,
		"releases what it could not hand over: the queue is full": 1,
		"makes report:42":                                         2,
		"made report:42, and released":                            2,
		"2 reports, one after the other.":                         1,
	},
	"leader": {
		"is killed":  1,
		"3 leaders,": 1,
	},
	"tokenrefresh": {
		"refreshes it":   1,
		"refreshed it":   1,
		"found it fresh": 11,
		"1 refresh.":     1,
	},
}

// bin is where the built programs are.
var bin string

func TestMain(m *testing.M) {
	os.Exit(func() int {
		var err error
		if bin, err = os.MkdirTemp("", "redfour-examples-"); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer os.RemoveAll(bin) //nolint:errcheck // It is of no use any more.
		// The version control stamp is of no use here, and needs git. The last separator makes it a directory.
		args := []string{"build", "-buildvcs=false", "-o", bin + string(filepath.Separator)}
		if info, ok := debug.ReadBuildInfo(); ok && slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"}) {
			args = append(args, "-race") // As the test is built, so are they.
		}
		if out, err := exec.Command("go", append(args, "./...")...).CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "go build: %v\n%s", err, out)
			return 1
		}
		return m.Run()
	}())
}

// program is the command that runs an example.
func program(t *testing.T, name, redisURL string) *exec.Cmd {
	t.Helper()
	path := filepath.Join(bin, name)
	if exe, _ := filepath.Glob(path + ".exe"); exe != nil { // on Windows
		path = exe[0]
	}
	cmd := exec.CommandContext(t.Context(), path)
	cmd.Env = append(os.Environ(), "REDIS_URL="+redisURL)
	return cmd
}

// check runs an example, and compares what it prints with programs. A password in the URL is "secret".
func check(t *testing.T, name, redisURL string) {
	t.Helper()
	out, err := program(t, name, redisURL).CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if bytes.Contains(out, []byte("secret")) {
		t.Errorf("it shows the password of the server:\n%s", out)
	}
	for text, want := range programs[name] {
		if n := bytes.Count(out, []byte(text)); n != want {
			t.Errorf("%q is printed %d times, want %d:\n%s", text, n, want, out)
		}
	}
}

func TestPrograms_onTheServerInside(t *testing.T) {
	for name := range programs {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			check(t, name, "")
		})
	}
}

func TestPrograms_keepThePasswordOfABadURL(t *testing.T) {
	for name := range programs {
		for what, url := range map[string]string{
			"where nothing listens": "redis://user:secret@127.0.0.1:0/0",
			"without a sound port":  "redis://user:secret@127.0.0.1:port/0",
			"that is none":          "secret",
		} {
			t.Run(name+" "+what, func(t *testing.T) {
				t.Parallel()
				out, err := program(t, name, url).CombinedOutput()
				if err == nil || !bytes.Contains(out, []byte(name+": ")) || bytes.Contains(out, []byte("secret")) {
					t.Errorf("%v\n%s", err, out)
				}
			})
		}
	}
}

// Each program is in the table of the README, and in the tests.
func TestPrograms_areListed(t *testing.T) {
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	sources, err := filepath.Glob("*/main.go")
	if err != nil {
		t.Fatal(err)
	}
	if len(sources) != len(programs) {
		t.Errorf("%d programs, of which %d are tested", len(sources), len(programs))
	}
	for _, source := range sources {
		name := filepath.Dir(source)
		if programs[name] == nil || !bytes.Contains(readme, []byte("| `go run ./"+name+"` |")) {
			t.Errorf("%s is not tested, or not in the README", name)
		}
	}
}
