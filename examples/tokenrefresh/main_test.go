package main_test

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

func TestTokenrefresh(t *testing.T) {
	program := filepath.Join(t.TempDir(), "tokenrefresh.exe") // Windows insists on the suffix, and nobody else minds.
	// The version control stamp is of no use here, and needs git.
	if out, err := exec.CommandContext(t.Context(), "go", "build", "-buildvcs=false", "-o", program, ".").CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	run := func(t *testing.T, redisURL string) ([]byte, error) {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), program)
		cmd.Env = append(os.Environ(), "REDIS_URL="+redisURL)
		return cmd.CombinedOutput()
	}

	t.Run("refreshes once", func(t *testing.T) {
		out, err := run(t, "")
		if err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		for text, want := range map[string]int{"refreshes it": 1, "refreshed it": 1, "found it fresh": 11, "1 refresh.": 1} {
			if n := bytes.Count(out, []byte(text)); n != want {
				t.Errorf("%q is printed %d times, want %d:\n%s", text, n, want, out)
			}
		}
	})

	for name, url := range map[string]string{
		"where nothing listens": "redis://user:secret@127.0.0.1:0/0",
		"without a sound port":  "redis://user:secret@127.0.0.1:port/0",
		"that is none":          "secret",
	} {
		t.Run("keeps the password of a URL "+name, func(t *testing.T) {
			out, err := run(t, url)
			if err == nil || !bytes.Contains(out, []byte("tokenrefresh: ")) || bytes.Contains(out, []byte("secret")) {
				t.Errorf("%v\n%s", err, out)
			}
		})
	}
}
