package otelredfour

import "github.com/redfour-go/redfour"

// Read returns what every metric that is no histogram says of s, by its name and the value of its own attribute.
func Read(s redfour.Stats) map[string]int64 {
	values := make(map[string]int64)
	for _, c := range table {
		for _, one := range c.all {
			values[c.name+" "+one.value] = one.read(s)
		}
	}
	return values
}
